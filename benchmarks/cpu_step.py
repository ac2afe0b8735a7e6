"""Training steps on the CPU: Shoestring and transformers' DeepseekV3ForCausalLM, with interleaved steps.

    python benchmarks/cpu_step.py [--pairs 10] [--json benchmarks/results/cpu_step.json]

Both train the same shape (20 M parameters, 32 experts, top-4, batch 4 x 256) from random weights with torch's fused
AdamW: forward, loss, backward, clipping, update. Each has a separate process with as many threads as there are cores:
Shoestring with the variables that its launcher sets, the peer without and, for comparison, with them. The peer uses
its defaults, grouped experts and SDPA attention.
Moments have the compute dtype on both sides. In BF16 the peer has only BF16 weights; Shoestring also has FP32 masters
and FP32 gradients.
The lower bound is the model's FLOPs (convention: trainer/costs/flops.py) divided by the rate of a large matrix product,
measured between the steps.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from shoestring.comm.async_comm import InlineCommunicator
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import TrafficCounter
from shoestring.launch.run.rank_environment import COMMON_ENVIRONMENT
from shoestring.trainer.build import PipelineRuntime, build_stepper
from shoestring.trainer.costs.flops import count_flops
from shoestring.trainer.costs.parameters import count_parameters
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model, initialize_weights
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.run.step import StepSettings

BATCH, LENGTH = 4, 256
SHAPE = ModelConfig(
    name="cpu_step",
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=6,
    first_k_dense_replace=1,
    num_attention_heads=8,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=1024,
    moe_intermediate_size=128,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
    initializer_range=0.02,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that runs one optimizer step of Shoestring's Stepper."""
    topology = Topology()
    groups = ProcessGroups.create(topology, 0, timedelta(seconds=1))
    model = Model(SHAPE)
    initialize_weights(model, seed=0)
    exchange = build_token_exchange(
        ExchangeConfig(), groups, SHAPE.n_routed_experts, InlineCommunicator(), TrafficCounter(topology, 0)
    )
    pipeline = PipelineRuntime(StageLayout.build(SHAPE, LENGTH), groups, torch.device("cpu"))
    optimizer = OptimizerConfig(moments=str(dtype).removeprefix("torch."))
    stepper = build_stepper(pipeline, model, exchange, dtype, 1, optimizer)
    settings = StepSettings(
        learning_rate=1e-4,
        clip_norm=1.0,
        seq_aux_loss_coeff=1e-4,
        mtp_loss_scaling_factor=0.3,
        router_bias_update_rate=0.001,
    )
    tokens_BW = torch.randint(0, SHAPE.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool))
    return lambda: stepper.step([batch], BATCH, settings).loss


def theirs(dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that runs one optimizer step of the peer."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": SHAPE.vocab_size,
        "hidden_size": SHAPE.hidden_size,
        "num_hidden_layers": SHAPE.num_hidden_layers,
        "first_k_dense_replace": SHAPE.first_k_dense_replace,
        "num_attention_heads": SHAPE.num_attention_heads,
        "num_key_value_heads": SHAPE.num_attention_heads,
        "q_lora_rank": SHAPE.q_lora_rank,
        "kv_lora_rank": SHAPE.kv_lora_rank,
        "qk_nope_head_dim": SHAPE.qk_nope_head_dim,
        "qk_rope_head_dim": SHAPE.qk_rope_head_dim,
        "v_head_dim": SHAPE.v_head_dim,
        "intermediate_size": SHAPE.intermediate_size,
        "moe_intermediate_size": SHAPE.moe_intermediate_size,
        "n_routed_experts": SHAPE.n_routed_experts,
        "n_shared_experts": SHAPE.n_shared_experts,
        "num_experts_per_tok": SHAPE.num_experts_per_tok,
        "n_group": SHAPE.n_group,
        "topk_group": SHAPE.topk_group,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
    }
    model: torch.nn.Module = DeepseekV3ForCausalLM(DeepseekV3Config(**settings))
    model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens_BS = torch.randint(0, SHAPE.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        loss: torch.Tensor = model(input_ids=tokens_BS, labels=tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a 1024-cubed matrix product, the best of five."""
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


@dataclass(frozen=True)
class Peer:
    """One of the compared implementations."""

    build: str
    """Name of the function of this module that builds its step."""
    environment: Mapping[str, str]


PEERS = {
    "shoestring": Peer("ours", COMMON_ENVIRONMENT),
    "transformers": Peer("theirs", {}),
    "transformers, our variables": Peer("theirs", COMMON_ENVIRONMENT),
}


class Child:
    """Process that runs a step on request."""

    def __init__(self, peer: Peer, precision: str) -> None:
        plain = {name: value for name, value in os.environ.items() if name not in COMMON_ENVIRONMENT}
        environment = {**plain, **peer.environment, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, __file__, "--serve", peer.build, precision]
        self._process = Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True)

    def step(self) -> float:
        """Run one step; return its seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def serve(build: str, precision: str) -> None:
    """Run one step per line of standard input, and print its seconds as a line."""
    step = {"ours": ours, "theirs": theirs}[build](DTYPES[precision])
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def measure(name: str, pairs: int) -> dict[str, Any]:
    """Time `pairs` interleaved steps of each, after two warm-up steps; ratios are medians over neighboring steps."""
    dtype = DTYPES[name]
    children = {peer: Child(PEERS[peer], name) for peer in PEERS}
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    rates = []
    for repetition in range(pairs + 2):
        rates.append(gemm_rate(dtype))
        for peer, child in children.items():
            taken = child.step()
            if repetition >= 2:
                seconds[peer].append(taken)
    for child in children.values():
        child.close()
    flops = count_flops(SHAPE, LENGTH).main_model * BATCH * LENGTH
    floor = flops / statistics.median(rates)
    return {
        "precision": name,
        "floor_ms": 1000 * floor,
        "gemm_gflops": statistics.median(rates) / 1e9,
        "peers": {peer: figures(seconds["shoestring"], times) for peer, times in seconds.items()},
    }


def figures(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return the figures of one peer compared with Shoestring."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    median = statistics.median(theirs)
    return {
        "step_ms": 1000 * median,
        "tokens_per_second": BATCH * LENGTH / median,
        "ratio_median_of_pairs": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> None:
    """Measure both precisions, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--precision", choices=list(DTYPES), action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    count = count_parameters(SHAPE)
    print(
        f"{count.main / 1e6:.2f} M parameters, {count.main_active / 1e6:.2f} M active; "
        f"{torch.get_num_threads()} threads each"
    )
    rows = [measure(name, options.pairs) for name in options.precision or DTYPES]
    for row in rows:
        print(f"{row['precision']}: lower bound {row['floor_ms']:.0f} ms at {row['gemm_gflops']:.0f} GFLOP/s")
        for peer, found in row["peers"].items():
            spread = f"{found['ratio_min']:.2f} to {found['ratio_max']:.2f}"
            print(
                f"  {peer:28} {found['step_ms']:5.0f} ms  {found['tokens_per_second']:5.0f} tokens/s  "
                f"{found['ratio_median_of_pairs']:.3f} x Shoestring's time ({spread})"
            )
    if options.json:
        document = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
