"""Loss over the whole validation split: each target counts once, over all ranks.

A checkpoint is saved before the evaluation that is due at its step. A file in the run directory holds the last
evaluated step, so that a resumed run knows whether that evaluation is pending.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ...comm.files.file_io import read_text, replace_file_atomically
from ...comm.files.strict_json import MalformedFileError
from ...comm.groups import ProcessGroups
from ...comm.host_transfer import to_device, to_host
from ...comm.units import ceil_div
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
    """Return the mean cross-entropy of the next token in nats and the number of targets; None if stopped early.

    `forwards` builds the executor of a given number of forwards. `stop_requested` is called before each group of
    micro-batches; all ranks stop together if it returns True on any of them.
    """
    # All ranks run the same number of micro-batches, the last ones maybe all padding: the token exchange is a
    # collective of the expert-parallel group, and hangs if a member is missing.
    topology = groups.topology
    share = topology.dp * micro_batch
    rounds = ceil_div(len(samples), share)
    first = topology.dp_rank(groups.rank) * micro_batch
    starts = [index * share + first for index in range(rounds)]
    depth = chunks[0].model.config.num_nextn_predict_layers
    group_size = micro_batches_per_stop_check(topology.pp)
    metrics: list[MicroBatchMetrics] = []
    targets = 0
    with chunks[0].model.cache_fp8_weights():
        for begin in range(0, rounds, group_size):
            if any_rank_requested_stop(groups.world_cpu, stop_requested):
                return None
            group_starts = starts[begin : begin + group_size]
            batches = [padded_batch(samples, range(start, start + micro_batch)).to(device) for start in group_starts]
            forwards(len(batches)).run([StageRunner(chunk, batches, metrics=metrics) for chunk in chunks])
            # The ranks of a pipeline read the same samples: one of them counts.
            if groups.pp_rank == 0:
                targets += sum(int(count_targets(batch, depth)) for batch in batches)
    loss_sum = sum(float(each.main_loss_sum) for each in metrics)
    local_sums = to_device(torch.tensor((loss_sum, targets), dtype=torch.float64), device)
    total, count = to_host(groups.world.all_reduce_sum(local_sums, "sum of validation losses")).tolist()
    return total / count, int(count)


def micro_batches_per_stop_check(pp: int) -> int:
    """Return the number of micro-batches between two checks for a stop request, on `pp` pipeline ranks."""
    # A pipeline fills and drains in each group: with 4 micro-batches per rank the bubble is pp - 1 of 5 pp - 1
    # forwards, less than a fifth.
    return 1 if pp == 1 else 4 * pp


def padded_batch(samples: SampleDataset, indices: range) -> TokenBatch:
    """Return the samples with these indices; an index past the end gives a sample that is all padding."""
    batch = samples.read_batch([min(index, len(samples) - 1) for index in indices])
    exists_B = torch.tensor([index < len(samples) for index in indices])
    return TokenBatch(batch.tokens_BW, batch.valid_BW & exists_B[:, None])


_FILE = "evaluated"


def record_evaluated_step(run_dir: Path, step: int) -> None:
    """Record that the evaluation after `step` steps was reported. An `OSError` is suppressed: it will be repeated."""
    with suppress(OSError):
        replace_file_atomically(run_dir / _FILE, f"{step}\n".encode())


def clear_evaluated_step(run_dir: Path) -> None:
    """Remove the recorded step; called when a run begins from step 0."""
    with suppress(OSError):
        (run_dir / _FILE).unlink(missing_ok=True)


def read_evaluated_step(run_dir: Path) -> int:
    """Return the last recorded step; 0 if there is none or it cannot be read."""
    try:
        text = read_text(run_dir / _FILE, 1000).strip()
    except (OSError, MalformedFileError):
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
