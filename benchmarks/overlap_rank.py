"""One rank of benchmarks/overlap.py: pairs of steps with the halves of each FB interleaved and in sequence."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.bootstrap import TorchrunEnvironment, init_default_process_group
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import LinkType, Topology
from shoestring.comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from shoestring.comm.traffic import TrafficCounter
from shoestring.trainer.build import PipelineRuntime, build_stepper
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.init import initialize_weights
from shoestring.trainer.model.model import Model
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.run.step import Stepper, StepSettings
from shoestring.trainer.telemetry.trace import Span, TraceRecorder, merge_rank_traces, summarize_trace, write_rank_trace

LIMIT = timedelta(minutes=3)
LENGTH, SEQUENCES, MICRO_BATCHES = 256, 2, 6
SHAPE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=8,
    first_k_dense_replace=0,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    moe_intermediate_size=384,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
    initializer_range=0.02,
)
SETTINGS = StepSettings(
    learning_rate=1e-4,
    clip_norm=1.0,
    seq_aux_loss_coeff=1e-4,
    mtp_loss_scaling_factor=0.3,
    router_bias_update_rate=0.001,
)


class Trainer:
    """Training engine with overlapped or sequential FBs."""

    def __init__(self, groups: ProcessGroups, *, overlap: bool) -> None:
        topology, cpu = groups.topology, torch.device("cpu")
        self.trace = TraceRecorder(nvtx=False)
        stages = StageLayout.build(SHAPE, LENGTH, "dualpipev", topology.pp)
        model = Model(SHAPE, stages.model_shard(topology, groups.rank))
        initialize_weights(model, seed=0)
        self.traffic = TrafficCounter(topology, groups.rank)
        async_communicator = build_async_communicator(groups.ep, cpu, recorder=self.trace)
        exchange = build_token_exchange(
            ExchangeConfig(name="two_hop"), groups, SHAPE.n_routed_experts, async_communicator, self.traffic
        )
        pipeline = PipelineRuntime.open(stages, groups, cpu, overlap=overlap, recorder=self.trace)
        self.stepper: Stepper = build_stepper(
            pipeline, model, exchange, torch.float32, MICRO_BATCHES, OptimizerConfig()
        )
        self._closers = (async_communicator.close, pipeline.close, self.stepper.optimizer.close)

    def step(self) -> dict[str, float]:
        """Run one step; return the seconds of this rank's FBs: total, computation, all-to-alls, waits for these."""
        generator = torch.Generator().manual_seed(self.stepper.groups.topology.dp_rank(self.stepper.groups.rank))
        batches = []
        for _ in range(MICRO_BATCHES):
            tokens_BW = torch.randint(0, SHAPE.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
            batches.append(TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)))
        self.trace.spans.clear()
        self.trace.is_recording = True
        self.stepper.step(batches, SEQUENCES * MICRO_BATCHES * self.stepper.groups.topology.dp, SETTINGS)
        self.trace.is_recording = False
        return pair_seconds(self.trace.spans)

    def close(self) -> None:
        for close in self._closers:
            close()


def pair_seconds(spans: list[Span]) -> dict[str, float]:
    """Return the seconds of this rank's FBs by kind, and their share of the step's all-to-alls."""
    pairs = [span for span in spans if span.track is TimelineTrack.INSTRUCTION and span.name == "FB"]
    inside = [span for span in spans if any(pair.begin <= span.begin and span.end <= pair.end for pair in pairs)]
    whole = seconds(pairs)
    exposed = seconds([span for span in inside if span.name == EXPOSED_ALL_TO_ALL])
    exchanges = [span for span in spans if span.track is TimelineTrack.EXCHANGE]
    exchanging = [span for span in inside if span.track is TimelineTrack.EXCHANGE]
    return {
        "FB": whole,
        "compute": whole - exposed,
        "exchange": seconds(exchanging),
        EXPOSED_ALL_TO_ALL: exposed,
        "share": len(exchanging) / len(exchanges),
    }


def seconds(spans: list[Span]) -> float:
    return sum(span.end - span.begin for span in spans) / 1e9


def main(pp: int, pairs: int, output: str) -> None:
    environment = TorchrunEnvironment.read()
    assert environment is not None
    torch.set_num_threads(1)
    init_default_process_group(environment, torch.device("cpu"), LIMIT)
    topology = Topology(pp=pp, ep=environment.world_size // pp, gpus_per_node=1)
    holders = list(StageLayout.build(SHAPE, LENGTH, "dualpipev", pp).replica_pp_groups())
    groups = ProcessGroups.create(topology, environment.rank, LIMIT, holders)
    turns, serial = Trainer(groups, overlap=True), Trainer(groups, overlap=False)
    turns.step()
    serial.step()
    turns.traffic.reset()
    found = [
        (turns.step(), serial.step()) if pair % 2 else (serial.step(), turns.step())[::-1] for pair in range(pairs)
    ]
    own = {
        "turns": {key: median(turn[key] for turn, _ in found) for key in found[0][0]},
        "serial": {key: median(one[key] for _, one in found) for key in found[0][0]},
        "ratio": median(turn["FB"] / one["FB"] for turn, one in found),
        "exposed": median(turn[EXPOSED_ALL_TO_ALL] / turn["FB"] for turn, _ in found),
        "bytes_between_nodes": found[0][0]["share"] * turns.traffic.bytes_by_link()[LinkType.INFINIBAND] / pairs,
        "terms": summarize_trace(turns.trace.spans),
    }
    folder = Path(output)
    write_rank_trace(folder, environment.rank, turns.trace.spans)
    everyone = groups.world.all_gather_objects(own, "figures")
    if environment.rank == 0:
        merge_rank_traces(folder, environment.world_size)
        (folder / "figures.json").write_text(json.dumps(everyone))
    turns.close()
    serial.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
