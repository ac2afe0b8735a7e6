"""Predicted activations against a census of the memory that a layer's forward leaves."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from shoestring.comm.async_comm import InlineCommunicator
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import TrafficCounter
from shoestring.launch.compose import compose_run_config
from shoestring.parallelism.pipeline.instruction import run_to_completion
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.trainer.census import Census
from shoestring.tests.trainer.model.policies import POLICIES, names
from shoestring.trainer.costs.operation_memory import MicroBatchShape
from shoestring.trainer.memory.workspace import WorkspaceBytes
from shoestring.trainer.model import attention
from shoestring.trainer.model.chunk import Chunk
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.cpu_attention import causal_attention_reference
from shoestring.trainer.model.experts import routed_experts_memory, shared_experts_memory
from shoestring.trainer.model.forward_context import ForwardOutput, LossNormalizers, StageSpec
from shoestring.trainer.model.model import Model, initialize_weights
from shoestring.trainer.model.recompute import RecomputeModule
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.reference import ReferenceBackend

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=48,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=3,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=80,
    moe_intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=0,
)
FULL_QUERY = ModelConfig(**{**vars(CONFIG), "q_lora_rank": None, "n_shared_experts": 0, "norm_topk_prob": False})
WIDE = replace(CONFIG, hidden_size=256, intermediate_size=256, moe_intermediate_size=64)
REPORT = frozenset({RecomputeModule.NORM, RecomputeModule.UP_PROJECTION, RecomputeModule.SWIGLU})
DTYPES = [torch.float32, torch.bfloat16]
SCALES = LossNormalizers(1.0, 1.0, 1.0)


def layer_forward(
    config: ModelConfig, index: int, batch: MicroBatchShape, policy: frozenset[RecomputeModule], exchange: str = "flat"
) -> tuple[ForwardOutput, Census, int]:
    """Run one layer's forward; return it with the live part of its allocations and the bytes of its input."""
    model = Model(config)
    initialize_weights(model, seed=0)
    if batch.fp8:
        model.enable_fp8(Fp8LinearOps(ReferenceBackend()))
    topology = Topology()
    groups = ProcessGroups.create(topology, 0, timedelta(seconds=1))
    traffic = TrafficCounter(topology, 0)
    exchanger = build_token_exchange(
        ExchangeConfig(name=exchange), groups, config.n_routed_experts, InlineCommunicator(), traffic
    )
    stage = StageSpec(range(index, index + 1), is_first=False, is_last=False)
    chunk = Chunk(model, exchanger, batch.dtype, stage, recompute=policy)
    tokens_BW = torch.zeros((batch.sequences, batch.sequence_length + 1), dtype=torch.int64)
    valid_BW = torch.ones_like(tokens_BW, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    input_BSD = torch.randn((batch.sequences, batch.sequence_length, config.hidden_size), generator=generator).to(
        batch.dtype
    )
    with model.cache_fp8_weights():
        run_to_completion(chunk.forward(tokens_BW, valid_BW, SCALES, 0, input_BSD))  # allocations of the first use only
        with Census() as census:
            forward = run_to_completion(chunk.forward(tokens_BW, valid_BW, SCALES, 0, input_BSD))
    return forward, census, input_BSD.nbytes


def expected(
    config: ModelConfig, index: int, batch: MicroBatchShape, policy: frozenset[RecomputeModule] = frozenset()
) -> float:
    """Return the bytes that layer 0, a dense one, or layer 1 keeps, with its input."""
    return WorkspaceBytes(config, batch, policy, ExchangeConfig(), ep_size=1).layer_bytes(is_dense=index == 0)


def measured(
    config: ModelConfig, index: int, batch: MicroBatchShape, policy: frozenset[RecomputeModule], exchange: str = "flat"
) -> int:
    """Return the bytes that the layer keeps: its input and its allocations without the output, the next one's input."""
    forward, census, input_bytes = layer_forward(config, index, batch, policy, exchange)
    assert forward.output_BSD is not None
    return census.bytes - forward.output_BSD.nbytes + input_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("config", "length"), [(CONFIG, 24), (FULL_QUERY, 136)], ids=["V3", "V2-like"])
@pytest.mark.parametrize("layer", ["dense", "routed"])
def test_each_policy_keeps_what_is_expected(layer: str, config: ModelConfig, length: int, dtype: torch.dtype) -> None:
    batch = MicroBatchShape(2, length, dtype, on_cpu=True)
    index = ("dense", "routed").index(layer)
    found = {policy: measured(config, index, batch, policy) for policy in POLICIES}
    print(
        layer,
        dtype,
        {"+".join(policy): (size, expected(config, index, batch, policy)) for policy, size in found.items()},
    )
    wrong = {
        "+".join(policy): (size, expected(config, index, batch, policy))
        for policy, size in found.items()
        if size != pytest.approx(expected(config, index, batch, policy), rel=0.05)
    }
    assert not wrong
    falls = {policy: expected(config, index, batch) - expected(config, index, batch, policy) for policy in POLICIES}
    assert {policy: found[frozenset()] - size for policy, size in found.items()} == falls  # to the byte
    assert all(
        found[policy | {part}] < size
        for policy, size in found.items()
        for part in RecomputeModule
        if part not in policy
    )


@pytest.mark.parametrize("policy", [frozenset(), frozenset({RecomputeModule.UP_PROJECTION}), REPORT], ids=names)
@pytest.mark.parametrize("config", [WIDE, replace(WIDE, q_lora_rank=None)], ids=["V3", "V2-like"])
@pytest.mark.parametrize("layer", ["dense", "routed"])
def test_what_fp8_keeps_falls_as_expected(layer: str, config: ModelConfig, policy: frozenset[RecomputeModule]) -> None:
    kept = {}
    for fp8 in (False, True):
        batch = MicroBatchShape(2, 128, torch.bfloat16, on_cpu=True, fp8=fp8)
        index = ("dense", "routed").index(layer)
        kept[fp8] = measured(config, index, batch, policy), expected(config, index, batch, policy)
        assert kept[fp8][0] == pytest.approx(kept[fp8][1], rel=0.01)
    fall, predicted = (kept[False][which] - kept[True][which] for which in (0, 1))
    print(layer, names(policy), {"bf16": kept[False], "fp8": kept[True]}, f"fall {fall} predicted {predicted}")
    assert fall == pytest.approx(predicted, rel=0.01)
    assert fall > 0


@pytest.mark.parametrize("policy", [frozenset(), REPORT, frozenset(RecomputeModule)], ids=names)
@pytest.mark.parametrize("layer", ["dense", "routed"])
def test_with_a_fused_attention_fp8_keeps_its_output_once(
    layer: str, policy: frozenset[RecomputeModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's CPU kernel stands for those of GPUs, which keep their output, too; it needs heads of one width."""
    monkeypatch.setattr(attention, "causal_attention", causal_attention_reference)
    config = replace(WIDE, v_head_dim=WIDE.qk_head_dim)
    for fp8 in (False, True):
        batch = MicroBatchShape(2, 128, torch.bfloat16, on_cpu=False, fp8=fp8)
        index = ("dense", "routed").index(layer)
        assert measured(config, index, batch, policy) == pytest.approx(expected(config, index, batch, policy), rel=0.01)


def test_two_hops_keep_about_as_much() -> None:
    batch = MicroBatchShape(2, 24, torch.float32, on_cpu=True)
    found = measured(CONFIG, 1, batch, REPORT, "two_hop")
    assert found == pytest.approx(expected(CONFIG, 1, batch, REPORT), rel=0.05)


def test_the_reports_policy_on_the_reports_model() -> None:
    """A routed layer of DeepSeek-V3, a micro-batch of one sequence of 4096, BF16, not on a CPU: by hand."""
    config = compose_run_config(["model=deepseek_v3", "data.vocab_size=129280"]).model
    batch = MicroBatchShape(1, 4096, torch.bfloat16, on_cpu=False)
    recomputed = 2 * (2 * 7168 + 1536 + 512) + 4 * 7168  # norms, and the router's copy of one in FP32
    recomputed += 2 * 128 * (2 * 192 + 256)  # queries, keys, values
    recomputed += 2 * 9 * 2048  # SwiGLU of eight routed experts and a shared one
    assert expected(config, 1, batch) - expected(config, 1, batch, REPORT) == 4096 * recomputed


@pytest.mark.parametrize("policy", [frozenset(), REPORT], ids=["nothing", "report"])
@pytest.mark.parametrize("deferred", [False, True], ids=["B", "I and W"])
def test_a_phase_of_the_backward_frees_what_its_forward_kept(
    policy: frozenset[RecomputeModule], deferred: bool
) -> None:
    batch = MicroBatchShape(2, 24, torch.float32, on_cpu=True)
    forward, census, _ = layer_forward(CONFIG, 1, batch, policy)
    assert forward.output_BSD is not None
    grad_BSD, weights = torch.ones_like(forward.output_BSD), DelayedWeightGradients(deferred=deferred)
    steps = forward.backward(grad_BSD, weights)
    del forward

    experts = shared_experts_memory(CONFIG, batch) + routed_experts_memory(CONFIG, batch, CONFIG.n_routed_experts)
    # The input was allocated before the census.
    kept = expected(CONFIG, 1, batch, policy) - batch.hidden_state_bytes(CONFIG)
    of_weights = sum(each.nbytes for each in experts.activations if each.needed_for_wgrad and each.is_kept(policy))
    next(steps)
    told = census.bytes - kept
    assert told < 100  # losses, and the load of each expert
    next(steps)
    left = kept - experts.saved_bytes(policy) + (of_weights if deferred else 0)
    assert census.bytes - told == left
    run_to_completion(steps)
    assert deferred == (census.bytes > told)
    weights.flush()
    del steps, grad_BSD
    assert census.bytes <= told
