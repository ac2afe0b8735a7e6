"""The number and the places of a step's host waits for the device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import pytest
import torch

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.streams import DeviceStreams
from shoestring.comm.topology import Topology
from shoestring.comm.trace import NULL_RECORDER, SpanRecorder, TimelineTrack
from shoestring.comm.traffic import TrafficCounter
from shoestring.tests.comm.recorded_streams import RecordedStreams
from shoestring.tests.trainer.pretended_device import PretendedDevice
from shoestring.trainer.build import PipelineRuntime, build_stepper
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model, initialize_weights
from shoestring.trainer.model.recompute import RecomputeModule
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.precision.triton_backend import index_tensors
from shoestring.trainer.run.step import HOST_READS_PER_STEP, Stepper, StepSettings

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
    initializer_range=0.1,
)
ROUTED_LAYERS, MICRO_BATCHES, LENGTH = 4, 3, 8
SETTINGS = StepSettings(
    learning_rate=1e-3, clip_norm=0.1, seq_aux_loss_coeff=0.1, mtp_loss_scaling_factor=0.3, router_bias_update_rate=0.01
)


class PairWatch:
    """A watch on the waits of `device` at the start and the end of an FB."""

    def __init__(self) -> None:
        self.device = PretendedDevice()
        self.pairs = 0

    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        return self._pair() if track is TimelineTrack.INSTRUCTION and name == "FB" else NULL_RECORDER.span(track, name)

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        pass

    @contextmanager
    def _pair(self) -> Iterator[None]:
        before = Counter(self.device.waits)
        yield
        assert self.device.waits == before
        self.pairs += 1


def make_stepper(
    exchange: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    recorder: SpanRecorder = NULL_RECORDER,
    streams: DeviceStreams | None = None,
) -> Stepper:
    """Build one process whose program has FBs: two stages on one rank."""
    stages = StageLayout.build(CONFIG, LENGTH, "dualpipev", 1)
    groups = ProcessGroups.create(Topology(), 0, timedelta(seconds=1), stages.replica_pp_groups())
    with device:
        model = Model(CONFIG)
    initialize_weights(model, seed=0)
    worker, traffic = build_async_communicator(groups.ep, device, streams=streams), TrafficCounter(Topology(), 0)
    exchanger = build_token_exchange(ExchangeConfig(name=exchange), groups, CONFIG.n_routed_experts, worker, traffic)
    pipeline = PipelineRuntime(stages, groups, device, recorder=recorder, recompute=frozenset(RecomputeModule))
    return build_stepper(pipeline, model, exchanger, dtype, MICRO_BATCHES, OptimizerConfig())


def batches(device: torch.device) -> list[TokenBatch]:
    tokens_BW = torch.randint(0, CONFIG.vocab_size, (2, LENGTH + 2), generator=torch.Generator().manual_seed(3))
    return [TokenBatch(tokens_BW, tokens_BW > 5).to(device)] * MICRO_BATCHES


@pytest.mark.parametrize("exchange", ["flat", "two_hop"])
def test_the_budget_is_met_to_the_last_read(exchange: str) -> None:
    cpu, watch, streams = torch.device("cpu"), PairWatch(), RecordedStreams()
    stepper, micro_batches = make_stepper(exchange, cpu, recorder=watch, streams=streams), batches(cpu)
    for _ in range(2):  # the first one creates what later ones use
        streams.places.clear()
        watch.device.waits.clear()
        with watch.device:
            stepper.step(micro_batches, 2 * MICRO_BATCHES, SETTINGS)
        assert watch.device.waits == {"to_host": HOST_READS_PER_STEP}
        assert streams.places == {"AsyncHostCopy.wait": ROUTED_LAYERS * MICRO_BATCHES}
    assert watch.pairs


def test_numbers_for_the_grouped_kernels_do_not_make_it_wait() -> None:
    with PretendedDevice() as device:
        index_tensors(torch.device("cpu"), [(0, 128), (128, 160)])
    assert not device.waits


def test_a_look_elsewhere_is_seen() -> None:
    with PretendedDevice() as device:
        on_host, on_device = torch.arange(3), torch.arange(3, device="cpu")
        assert on_host.sum().item() == 3
        assert on_host.tolist() == on_device.cpu().tolist()  # one wait
        assert not device.waits - Counter({"test_a_look_elsewhere_is_seen": 1})
        assert float(on_device.sum()) == 3
        assert on_device[on_device > 0].tolist() == [1, 2]  # for the size, and for the numbers
        assert bool((on_device > 0).any())
        torch.tensor([1, 2], device="cpu")
        on_host.to(torch.device("cpu"))
        on_host.clone().copy_(on_device)
        on_host.clone().copy_(on_device, non_blocking=True)  # no wait
        assert on_host.new_zeros(2).tolist() == [0, 0]
    assert device.waits == {"test_a_look_elsewhere_is_seen": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("exchange", ["flat", "two_hop"])
def test_on_a_gpu_nothing_else_waits(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's sync debug mode raises at any wait; the counted reads are let through. BF16 is what Hopper groups."""
    device, reads = torch.device("cuda"), 0
    stepper, micro_batches = make_stepper(exchange, device, torch.bfloat16), batches(device)
    stepper.step(micro_batches, 2 * MICRO_BATCHES, SETTINGS)
    copy_to_host = torch.Tensor.cpu

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal reads
        reads += x.is_cuda
        torch.cuda.set_sync_debug_mode("default")
        try:
            return copy_to_host(x)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.step(micro_batches, 2 * MICRO_BATCHES, SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == HOST_READS_PER_STEP  # sizes come by events, which the debug mode lets through
