"""Cost of a checkpoint: time for which a save blocks a step, write speed, and memory of an export.

    python benchmarks/checkpoint.py [--megabytes 1024] [--directory DIR] [--json FILE]
    python benchmarks/checkpoint.py --export-gigabytes 4 [--directory DIR] [--json FILE]

Saves: a state of --megabytes, in tensors of 4 MB, on one process. An asynchronous save blocks for a copy, the first one
too, since its memory is reserved as in a run; it is compared with a copy of the state to memory that is in use. A
synchronous save is compared with a plain fsynced write of the same bytes; before either, as many bytes are written and
removed, so that the host of a virtual machine has backed the page cache. All are interleaved; the figure is the median
of the ratios of five rounds.
Export: a model of --export-gigabytes in FP32 is saved as a checkpoint, then exported by a separate process, whose peak
resident memory is printed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shoestring.comm.groups import Group
from shoestring.trainer.checkpoint.checkpoint import Checkpoint
from shoestring.trainer.checkpoint.pieces import TensorPiece, whole_tensor_pieces
from shoestring.trainer.checkpoint.saver import CheckpointSaver, write_rank_file
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore
from shoestring.trainer.checkpoint.tensor_file import TensorSpec, tensor_as_bytes
from shoestring.trainer.checkpoint.training_state import model_tensor_shapes
from shoestring.trainer.huggingface.export import ExportOptions, export_checkpoint
from shoestring.trainer.model.config import ModelConfig

ROUNDS = 5
TENSOR_BYTES = 4 * 2**20
WORLD = Group((0,), None, 0, timedelta(seconds=60))


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def plain_write(path: Path, tensors: list[Tensor]) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            file.write(tensor_as_bytes(tensor))
        os.fsync(file.fileno())


def write_and_remove(path: Path, tensors: list[Tensor]) -> None:
    plain_write(path, tensors)
    path.unlink()


def measure_saves(directory: Path, megabytes: int) -> dict[str, Any]:
    tensors = [torch.randn(TENSOR_BYTES // 4) for _ in range(megabytes * 2**20 // TENSOR_BYTES)]
    pieces = [piece for index, tensor in enumerate(tensors) for piece in whole_tensor_pieces(f"t{index}", tensor, (0,))]
    saver = CheckpointSaver(CheckpointStore(directory / "checkpoints", keep_last=1), WORLD)
    saver.reserve_memory(pieces)
    target = [torch.ones_like(tensor) for tensor in tensors]
    rounds = []
    for number in range(ROUNDS + 1):
        copy_s = timed(lambda: [to.copy_(tensor) for to, tensor in zip(target, tensors, strict=True)])
        blocked_s = timed(lambda number=number: saver.begin_save(2 * number, pieces, CheckpointExtras()))  # type: ignore[misc]
        saver.finish_save()
        write_and_remove(directory / "before", tensors)
        write_s = timed(lambda: plain_write(directory / "plain", tensors))
        (directory / "plain").unlink()
        write_and_remove(directory / "before", tensors)
        save_s = timed(lambda number=number: save(saver, 2 * number + 1, pieces))  # type: ignore[misc]
        rounds.append((copy_s, blocked_s, write_s, save_s))
    saver.close()
    copy_s, blocked_s, write_s, save_s = (median(column) for column in zip(*rounds[1:], strict=True))
    return {
        "megabytes": megabytes,
        "first_blocked_ms": 1e3 * rounds[0][1],
        "blocked_ms": 1e3 * blocked_s,
        "copy_ms": 1e3 * copy_s,
        "allowed_ms": 1.5e3 * copy_s + 50,
        "save_MB_s": megabytes * 2**20 / 1e6 / save_s,
        "plain_write_MB_s": megabytes * 2**20 / 1e6 / write_s,
        "save_over_plain_write": median(each[2] / each[3] for each in rounds[1:]),
    }


def save(saver: CheckpointSaver, step: int, pieces: list[TensorPiece]) -> None:
    saver.begin_save(step, pieces, CheckpointExtras())
    saved = saver.finish_save()
    assert saved is not None
    assert saved.failure is None


def model_of(gigabytes: float) -> ModelConfig:
    """Return a model with most parameters in its experts, as in DeepSeek-V3."""
    config = ModelConfig(
        name="export",
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        q_lora_rank=384,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        v_head_dim=64,
        intermediate_size=4096,
        moe_intermediate_size=512,
        n_routed_experts=16,
    )
    rest = sum(
        torch.Size(shape).numel() for name, shape in model_tensor_shapes(config).items() if "/expert_" not in name
    )
    expert = 3 * config.moe_intermediate_size * config.hidden_size
    routed = config.num_moe_layers + config.num_nextn_predict_layers
    per_group = round((gigabytes * 1e9 / 4 - rest) / (routed * expert * config.n_group))
    return ModelConfig(
        **{**asdict(config), "n_routed_experts": max(2, per_group) * config.n_group, "rope_scaling": None}
    )


def write_model(directory: Path, config: ModelConfig) -> Checkpoint:
    """Write a checkpoint of random weights, one file per batch of tensors, so that this process stays small too."""
    store = CheckpointStore(directory, keep_last=1)
    store.prepare_save(0)
    shapes = model_tensor_shapes(config)
    names = list(shapes)
    for number in range(0, len(names), 16):
        batch = [piece for name in names[number : number + 16] for piece in random_piece(name, shapes[name])]
        write_rank_file(store.partial_path(0), f"part_{number:05d}", batch)
    facts = {"step": 0, "config": {"model": asdict(config)}}
    return Checkpoint.open(store.commit_save(0, CheckpointExtras(facts, required_tensors=frozenset(names))))


def random_piece(name: str, shape: tuple[int, ...]) -> Iterator[TensorPiece]:
    yield from whole_tensor_pieces(name, torch.randn(shape), (0,))


def measure_export(directory: Path, gigabytes: float) -> dict[str, Any]:
    checkpoint = write_model(directory / "store", model_of(gigabytes))
    sizes = {"gigabytes": checkpoint.manifest.total_bytes / 1e9, "largest_tensor_MB": largest(checkpoint) / 1e6}
    rows = {}
    for dtype in ("bf16", "fp8"):
        command = [sys.executable, __file__, "--exporting", str(checkpoint.path), str(directory / dtype), dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[dtype] = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(directory / dtype)
    return {**sizes, **{f"{dtype}_{key}": value for dtype, row in rows.items() for key, value in row.items()}}


def largest(checkpoint: Checkpoint) -> int:
    return max(TensorSpec("", tensor.dtype, tensor.shape).nbytes for tensor in checkpoint.manifest.tensors.values())


def exporting(path: Path, directory: Path, dtype: str) -> None:
    """Export in this process, then print time and peak memory."""
    before = peak_mb()
    took = timed(lambda: export_checkpoint(Checkpoint.open(path), directory, ExportOptions(dtype), lambda _: None))
    print(json.dumps({"seconds": took, "peak_MB": peak_mb(), "peak_before_MB": before}))


def peak_mb() -> float:
    """Return the peak resident memory of this process; `ru_maxrss` would start with that of its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the saved state (default 1024)")
    parser.add_argument("--export-gigabytes", type=float, help="measure an export of a model of this size instead")
    parser.add_argument("--directory", type=Path, help="directory on the disk to measure (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--exporting", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exporting:
        exporting(Path(options.exporting[0]), Path(options.exporting[1]), options.exporting[2])
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        if options.export_gigabytes is None:
            figures = measure_saves(Path(folder), options.megabytes)
        else:
            figures = measure_export(Path(folder), options.export_gigabytes)
    table = Table(title="Checkpoints on one process", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console(width=100).print(table)
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
