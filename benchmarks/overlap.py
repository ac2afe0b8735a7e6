"""Share of the all-to-alls that is overlapped when the forward of one micro-batch runs with the backward of another.

    python benchmarks/overlap.py [--json FILE] [--trace FILE]      needs root, for simulated nodes

Two nodes of one rank, one core each, experts on both, DualPipeV on a pipeline of one rank: every FB is measured
interleaved and with the forward first, in neighboring steps. The uplinks are set so that all-to-alls take nearly as
long as computation. Then four nodes, with a pipeline of two ranks.
"""

import argparse
import json
import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import LinkType, Topology
from shoestring.comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from shoestring.comm.traffic import TrafficCounter
from shoestring.launch.cluster.simulated_cluster import SimulatedCluster
from shoestring.launch.run.on_ranks import RankContext, run_on_ranks
from shoestring.trainer.build import PipelineRuntime, build_stepper
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model, initialize_weights
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.run.step import Stepper, StepSettings
from shoestring.trainer.telemetry.trace import Span, TraceRecorder, merge_rank_traces, summarize_trace, write_rank_trace

TRIES = 4
BALANCE = 1.15
"""Target ratio of computation to all-to-all time; figures are valid from 0.8 to 1.25, and include the ratio."""
LIMIT = timedelta(minutes=3)
SECONDS = 600.0
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
        pipeline = PipelineRuntime(stages, groups, cpu, overlap=overlap, recorder=self.trace)
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


def measure(rank: RankContext, argument: tuple[int, int, Path]) -> dict[str, Any]:
    """Run pairs of steps with the halves of each FB interleaved and in sequence; return this rank's figures."""
    pp, pairs, folder = argument
    torch.set_num_threads(1)
    topology = Topology(pp=pp, ep=rank.world_size // pp, gpus_per_node=1)
    groups = rank.open_groups(topology, StageLayout.build(SHAPE, LENGTH, "dualpipev", pp).replica_pp_groups())
    turns, serial = Trainer(groups, overlap=True), Trainer(groups, overlap=False)
    turns.step()
    serial.step()
    turns.traffic.reset()
    found = [
        (turns.step(), serial.step()) if pair % 2 else (serial.step(), turns.step())[::-1] for pair in range(pairs)
    ]
    write_rank_trace(folder, rank.rank, turns.trace.spans)
    groups.world.barrier("traces")
    if rank.rank == 0:
        merge_rank_traces(folder, rank.world_size)
    turns.close()
    serial.close()
    return {
        "turns": {key: median(turn[key] for turn, _ in found) for key in found[0][0]},
        "serial": {key: median(one[key] for _, one in found) for key in found[0][0]},
        "ratio": median(turn["FB"] / one["FB"] for turn, one in found),
        "exposed": median(turn[EXPOSED_ALL_TO_ALL] / turn["FB"] for turn, _ in found),
        "bytes_between_nodes": found[0][0]["share"] * turns.traffic.bytes_by_link()[LinkType.INFINIBAND] / pairs,
        "terms": summarize_trace(turns.trace.spans),
    }


def run(nodes: int, pp: int, pairs: int, uplink: str, folder: Path) -> list[dict[str, Any]]:
    """Run the benchmark on a simulated cluster; return the figures of every rank."""
    with SimulatedCluster(nodes=nodes, uplink=uplink) as cluster:
        return run_on_ranks(
            measure, (pp, pairs, folder), nodes, device="cpu", timeout=LIMIT, seconds=SECONDS, start=cluster.run_ranks
        )


def balanced(nodes: int, pp: int, pairs: int, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Find the uplink at which computation takes `BALANCE` times as long as all-to-alls; return it with its figures.

    The first guess comes from the bytes and the computation on fast links; each run corrects it.
    """
    free = run(nodes, pp, 2, "10gbit", folder / "free")
    sent = max(rank["bytes_between_nodes"] for rank in free)
    mbit = BALANCE * 8 * sent / mean(rank["serial"]["compute"] for rank in free) / 1e6
    for attempt in range(TRIES):
        uplink = f"{max(1, round(mbit))}mbit"
        found = run(nodes, pp, pairs, uplink, folder / f"try{attempt}")
        balance = mean(rank["serial"]["compute"] / rank["serial"]["exchange"] for rank in found)
        print(f"uplinks of {uplink}: computation / all-to-all {balance:.2f}", flush=True)
        if abs(balance - BALANCE) < 0.1:
            break
        mbit *= BALANCE / balance
    return uplink, found


def show(title: str, found: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    headings = ("rank", "FB in turns, ms", "F then B, ms", "ratio", "compute : exchange", "exposed of FB")
    for heading in headings:
        table.add_column(heading, justify="right")
    for number, rank in enumerate(found):
        turns, serial = rank["turns"], rank["serial"]
        share = f"{serial['compute'] / serial['exchange']:.2f}"
        times = (f"{1e3 * each['FB']:.0f}" for each in (turns, serial))
        table.add_row(str(number), *times, f"{rank['ratio']:.3f}", share, f"{100 * rank['exposed']:.1f} %")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--trace", type=Path, help="write the timeline of the last interleaved step to this file")
    options = parser.parse_args()
    console = Console(width=120)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        uplink, results["two nodes"] = balanced(2, 1, options.pairs, folder)
        console.print(show(f"FBs of one step, 2 nodes x 1 rank, uplinks of {uplink}", results["two nodes"]))
        if options.trace is not None:
            shutil.copy(max(folder.glob("try*")) / "trace.json", options.trace)
        results["four nodes"] = run(4, 2, 3, uplink, folder / "four")
        console.print(
            show(f"FBs of one step, 4 nodes x 1 rank, pp 2 x ep 2, uplinks of {uplink}", results["four nodes"])
        )
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "uplink": uplink} | results, indent=1))


if __name__ == "__main__":
    main()
