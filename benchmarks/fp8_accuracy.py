"""Training in FP8 and BF16 on a CPU with equal weights, data and seeds (report §3.3, appendix B).

    python benchmarks/fp8_accuracy.py [--steps 400] [--seeds 3] [--json PATH]

Four runs from the same weights: BF16; FP32, which shows the effect of rounding alone; FP8 with the reference backend;
and FP8 whose activation gradients have one scale per 128 × 128 instead of 1 × 128, with which the report saw a 16 B
model diverge at 300 B tokens (appendix B.2). The model is the quickstart's with three layers, on the bytes of its
corpus. Losses are smoothed with a factor of 0.9 as in the report and compared over the last quarter of the steps; the
report stays below 0.25 %. Then, for each Linear, the error of its input gradient with both scalings, in a model trained
in FP8 (without experts and the Linear after a SwiGLU, whose inputs no module hook sees).
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shoestring.trainer.data
from shoestring.comm.async_comm import InlineCommunicator
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.fp8 import TILE_WIDTH
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import TrafficCounter
from shoestring.trainer.build import PipelineRuntime, build_stepper
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.linear import Linear
from shoestring.trainer.model.model import Model, initialize_weights
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.fp8_tensors import RowwiseFp8Tensor, ScaleFormat, quantize_weight
from shoestring.trainer.precision.reference import ReferenceBackend
from shoestring.trainer.run.step import Stepper, StepSettings

BATCH, LENGTH = 8, 128
SHAPE = replace(ModelConfig(), name="bytes", vocab_size=256, num_hidden_layers=3, num_nextn_predict_layers=0)
PEAK_RATE = 4e-4
SMOOTHING = 0.9
REPORTED = 0.0025


@dataclass(frozen=True)
class BlockGradients(ReferenceBackend):
    """Ablation: tensors that are quantized inside a backward share a scale over 128 rows too."""

    def quantize_rowwise(self, x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
        if torch._C._current_graph_task_id() == -1:  # no backward is running
            return super().quantize_rowwise(x_XD, scales)
        return block_tiles(x_XD, scales)


def block_tiles(x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
    """Quantize in 128 × 128 blocks, stored as tiles with equal scales."""
    blocks = quantize_weight(x_XD, scales)
    return RowwiseFp8Tensor(blocks.values_NK, blocks.scales_PQ.repeat_interleave(TILE_WIDTH, 0)[: len(x_XD)])


@dataclass(frozen=True)
class Way:
    """Precision of a run."""

    dtype: torch.dtype = torch.bfloat16
    provider: ReferenceBackend | None = None


WAYS = {
    "bf16": Way(),
    "fp32": Way(torch.float32),
    "fp8": Way(provider=ReferenceBackend()),
    "fp8 block gradients": Way(provider=BlockGradients()),
}


def text() -> Tensor:
    """Return the corpus with one byte per token."""
    directory = Path(shoestring.trainer.data.__file__).parent / "corpus" / "shakespeare"
    works = [path.read_bytes() for path in sorted(directory.glob("*.txt"))]
    return torch.frombuffer(bytearray(b"".join(works)), dtype=torch.uint8).to(torch.int64)


def batches(tokens: Tensor, seed: int) -> Iterator[TokenBatch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (BATCH,), generator=generator).tolist()
        tokens_BW = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
        yield TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool))


def build(way: Way, seed: int) -> Stepper:
    topology = Topology()
    groups = ProcessGroups.create(topology, 0, timedelta(seconds=1))
    model = Model(SHAPE)
    initialize_weights(model, seed)
    if way.provider is not None:
        model.enable_fp8(Fp8LinearOps(way.provider))
    exchange = build_token_exchange(
        ExchangeConfig(), groups, SHAPE.n_routed_experts, InlineCommunicator(), TrafficCounter(topology, 0)
    )
    pipeline = PipelineRuntime(StageLayout.build(SHAPE, LENGTH), groups, torch.device("cpu"))
    return build_stepper(pipeline, model, exchange, way.dtype, 1, OptimizerConfig())


def settings(step: int, steps: int) -> StepSettings:
    """Return settings with warm-up over a tenth of the run and decay over its second half.

    With a high rate to the end, two runs that differ in the last bit diverge by more than the effect to measure.
    """
    done = (step + 1) / steps
    rate = PEAK_RATE * min(1.0, 10 * done, 0.5 * (1 + math.cos(math.pi * (2 * done - 1))) if done > 0.5 else 1.0)
    return StepSettings(
        learning_rate=rate,
        clip_norm=1.0,
        seq_aux_loss_coeff=1e-4,
        mtp_loss_scaling_factor=0.0,
        router_bias_update_rate=0.001,
    )


def train(name: str, tokens: Tensor, seed: int, steps: int) -> tuple[Stepper, list[float]]:
    """Train; return the smoothed loss of each step."""
    stepper, data = build(WAYS[name], seed), batches(tokens, seed)
    smoothed: list[float] = []
    began = time.monotonic()
    for step in range(steps):
        loss = stepper.step([next(data)], BATCH, settings(step, steps)).loss
        smoothed.append(loss if not smoothed else SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * loss)
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - began
            print(f"  {name}, seed {seed}: step {step + 1}, loss {smoothed[-1]:.4f}, {seconds:.0f} s", flush=True)
    return stepper, smoothed


def late(losses: list[float]) -> list[float]:
    return losses[-(len(losses) // 4) :]


def difference(ours: list[float], base: list[float]) -> float:
    """Return the mean of (ours - base) / base over the last quarter."""
    return statistics.mean((one - other) / other for one, other in zip(late(ours), late(base), strict=True))


@contextmanager
def watched(model: Model, seen: Callable[[str, Linear, Tensor], None]) -> Iterator[None]:
    """Pass the output gradient of every FP8 Linear to `seen`."""

    def watch(name: str, module: Linear) -> Any:
        def hook(_module: torch.nn.Module, _grad_inputs: Any, grad_outputs: Any) -> None:
            seen(name, module, grad_outputs[0])

        return module.register_full_backward_hook(hook)

    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    handles = [watch(name, module) for name, module in linears.items() if module.fp8 is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_gradient_errors(stepper: Stepper, batch: TokenBatch) -> dict[str, tuple[float, float]]:
    """Return ‖Δ‖ / ‖exact‖ of each Linear's input gradient, for output gradients scaled in 1 × 128 and 128 × 128."""
    errors: dict[str, tuple[float, float]] = {}

    def seen(name: str, module: Linear, grad: Tensor) -> None:
        grad_RN = grad.flatten(0, -2).float()
        provider, weight = ReferenceBackend(), provider_blocks(module)
        exact_RK = grad_RN.double() @ module.weight.detach().double()
        found = []
        for tiles in (provider.quantize_rowwise(grad_RN, ScaleFormat.FP32), block_tiles(grad_RN, ScaleFormat.FP32)):
            error_RK = provider.gemm(tiles, weight, torch.float64) - exact_RK
            found.append(float(error_RK.norm() / exact_RK.norm()))
        errors[name] = (found[0], found[1])

    def provider_blocks(module: Linear) -> Any:
        return quantize_weight(module.weight.detach(), ScaleFormat.FP32).transposed()

    with watched(stepper.model, seen):
        stepper.step([batch], BATCH, settings(0, 1))
    return errors


def main() -> None:
    """Train, print the figures of the report, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens = text()
    curves: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    errors: dict[str, tuple[float, float]] = {}
    for seed in range(options.seeds):
        for name in WAYS:
            stepper, losses = train(name, tokens, seed, options.steps)
            curves[name].append(losses)
            if name != "bf16":
                print(f"{name}, seed {seed}: {difference(losses, curves['bf16'][seed]):+.3%}", flush=True)
            if seed == 0 and name == "fp8":
                errors = input_gradient_errors(stepper, next(batches(tokens, seed=10_000)))

    print("\nlast quarter, smoothed loss (mean of it), by seed")
    means = {name: [statistics.mean(late(losses)) for losses in each] for name, each in curves.items()}
    for name, each in means.items():
        print(f"  {name:20} " + "  ".join(f"{mean:.4f}" for mean in each))
    spread = (max(means["bf16"]) - min(means["bf16"])) / statistics.mean(means["bf16"])
    print(f"  spread of BF16 over seeds: {spread:.2%}")
    found = {}
    for name in list(WAYS)[1:]:
        each = [difference(ours, base) for ours, base in zip(curves[name], curves["bf16"], strict=True)]
        found[name] = {"by_seed": each, "mean": statistics.mean(each)}
        print(
            f"{name}: relative loss difference to BF16 {statistics.mean(each):+.3%}, "
            f"by seed {'  '.join(f'{one:+.3%}' for one in each)}"
        )
    print(f"the report's, at its scale: below {REPORTED:.2%}")
    print("\nrelative error of the gradient of inputs: 1 x 128, 128 x 128")
    for name, (tiles, blocks) in errors.items():
        print(f"  {name:35} {tiles:.4f}  {blocks:.4f}  {'larger' if blocks > tiles else 'NOT LARGER'}")
    for layer in sorted({name.split(".")[1] for name in errors}):
        of_layer = [pair for name, pair in errors.items() if name.split(".")[1] == layer]
        tiles, blocks = (statistics.mean(pair[way] for pair in of_layer) for way in (0, 1))
        print(
            f"  layer {layer}, mean of its Linears: {tiles:.4f}  {blocks:.4f}  {'larger' if blocks > tiles else 'NOT'}"
        )
    if options.json:
        document = {
            "steps": options.steps, "batch": BATCH, "length": LENGTH, "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0], "losses_last_quarter": means, "spread_bf16": spread, "difference": found,
            "input_gradient_errors": errors,
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
