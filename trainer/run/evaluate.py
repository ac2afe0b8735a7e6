"""Loss over the whole validation split, each target once, on all ranks together.

A checkpoint is saved before the evaluation that is due with it. A note in the run directory says up to which step the
run has been evaluated, so that a resumed run knows whether an evaluation is owed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ...comm.files.file_io import read_text
from ...comm.files.strict_json import MalformedFileError
from ...comm.groups import ProcessGroups
from ...comm.host_transfer import to_device, to_host
from ...parallelism.pipeline.executor import PipelineExecutor
from ..data.samples import SampleDataset, TokenBatch
from ..model.chunk import Chunk
from ..model.forward_context import MicroBatchMetrics
from .exit import any_rank_requested_stop, never_stop
from .stage_runner import StageRunner
from .step import count_targets


@torch.no_grad()
def evaluate_validation_loss(
    chunks: tuple[Chunk, ...],
    forwards: Callable[[int], PipelineExecutor],
    samples: SampleDataset,
    micro_batch: int,
    groups: ProcessGroups,
    device: torch.device,
    stop_requested: Callable[[], bool] = never_stop,
) -> tuple[float, int] | None:
    """Return the mean cross-entropy of the next token in nats, and over how many targets; None if it was left.

    `forwards` makes the program of so many forwards. Every rank runs as many micro-batches, the last ones of padding
    alone: the exchange needs all ranks of a group. `stop_asked` is asked before each group of micro-batches; all ranks
    leave together when it is true on any of them.
    """
    topology = groups.topology
    share = topology.dp * micro_batch
    rounds = -(-len(samples) // share)
    first = topology.dp_rank(groups.rank) * micro_batch
    starts = [index * share + first for index in range(rounds)]
    depth = chunks[0].model.config.num_nextn_predict_layers
    at_once = micro_batches_per_stop_check(topology.pp)
    summaries: list[list[MicroBatchMetrics]] = [[] for _ in chunks]
    targets = 0
    with chunks[0].model.cache_fp8_weights():
        for begin in range(0, rounds, at_once):
            if any_rank_requested_stop(groups.world_cpu, stop_requested):
                return None
            some = starts[begin : begin + at_once]
            batches = [padded_batch(samples, range(start, start + micro_batch)).to(device) for start in some]
            for found, stage in zip(summaries, _run(chunks, forwards, batches), strict=True):
                found += stage.metrics
            if groups.pp_rank == 0:
                targets += sum(int(count_targets(batch, depth)) for batch in batches)
    loss_sum = sum(float(summary.main_loss_sum) for found in summaries for summary in found)
    own = to_device(torch.tensor((loss_sum, targets), dtype=torch.float64), device)
    total, count = to_host(groups.world.all_reduce_sum(own, "sum of validation losses")).tolist()
    return total / count, int(count)


def micro_batches_per_stop_check(pp: int) -> int:
    """Micro-batches between two looks at a stop request, on `pp` pipeline ranks.

    A pipeline fills and drains in each group: with 4 for each rank, at most a fifth of its time (`pp - 1` of `5 pp`).
    """
    return 1 if pp == 1 else 4 * pp


def _run(
    chunks: tuple[Chunk, ...], forwards: Callable[[int], PipelineExecutor], batches: Sequence[TokenBatch]
) -> list[StageRunner]:
    stages = [StageRunner(chunk, batches) for chunk in chunks]
    forwards(len(batches)).run(stages)
    return stages


def padded_batch(samples: SampleDataset, indices: range) -> TokenBatch:
    """Samples by number; numbers past the end give samples that are padding throughout."""
    batch = samples.read_batch([min(index, len(samples) - 1) for index in indices])
    exists_B = torch.tensor([index < len(samples) for index in indices])
    return TokenBatch(batch.tokens_BW, batch.valid_BW & exists_B[:, None])


_FILE = "evaluated"


def record_evaluated_step(run_dir: Path, step: int) -> None:
    """Note that the evaluation after `step` steps is told. Where this cannot be written, it will come once more."""
    new = run_dir / f"{_FILE}.new"
    with suppress(OSError):
        new.write_text(f"{step}\n")
        new.replace(run_dir / _FILE)


def clear_evaluated_step(run_dir: Path) -> None:
    """Forget what was noted: a run begins from step 0."""
    with suppress(OSError):
        (run_dir / _FILE).unlink(missing_ok=True)


def read_evaluated_step(run_dir: Path) -> int:
    """Return the last step that was noted; 0 where there is none, or none that can be read."""
    try:
        text = read_text(run_dir / _FILE, 1000).strip()
    except (OSError, MalformedFileError):
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
