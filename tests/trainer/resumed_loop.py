"""Small runs that are trained on one layout and resumed on another, and their state."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.small_loop import BATCH, LENGTH, run_config
from shoestring.trainer import loop
from shoestring.trainer.build import RankResources, build_rank_resources, build_stage_layout
from shoestring.trainer.checkpoint.pieces import TensorPiece
from shoestring.trainer.checkpoint.tensor_file import tensor_as_bytes
from shoestring.trainer.config import RunConfig
from shoestring.trainer.structured_config import build_dataclass
from shoestring.trainer.telemetry.history import read_metrics

SEED = 1
"""Seed 0 makes two experts so nearly equal for one token that rounding decides, which moves a loss by 5e-5."""
Share = list[tuple[str, tuple[int, ...], torch.dtype, int, bytes]]
"""Pieces that a rank holds: name, shape and dtype of the tensor, the piece's first element and its bytes."""
LAYOUTS: dict[str, tuple[Topology, str]] = {
    "pp2 ep2": (Topology(pp=2, ep=2), "dualpipev"),
    "ep4": (Topology(ep=4), "1f1b"),
    "pp4": (Topology(pp=4), "1f1b"),
    "alone": (Topology(), "1f1b"),
    "pp2 ep2 edp2": (Topology(pp=2, ep=2, edp=2), "zb_h1"),
    "pp2 mirrored": (Topology(pp=2), "dualpipe"),
    "ep2": (Topology(ep=2), "1f1b"),
    "ep2 in BF16": (Topology(ep=2), "1f1b"),
    "pp2 in BF16": (Topology(pp=2), "1f1b"),
    "ep2 in FP8": (Topology(ep=2), "1f1b"),
    "pp2 in FP8": (Topology(pp=2), "zb_h1"),
    "ep2 in FP64": (Topology(ep=2), "1f1b"),
    "pp2 in FP64": (Topology(pp=2), "1f1b"),
}
PRECISIONS: dict[str, dict[str, str]] = {
    "BF16": {"compute": "bfloat16"},
    "FP8": {"compute": "bfloat16", "linear": "fp8"},
    "FP64": {"compute": "float64"},
}
FP32 = {"compute": "float32"}  # in which weights and masters share memory


def tree_of(root: Path, run: Path, layout: str, steps: int, **training: Any) -> dict[str, Any]:
    tree, (topology, schedule) = run_config(root), LAYOUTS[layout]
    tree["model"] |= {"num_hidden_layers": 4}
    precision = PRECISIONS.get(layout.rpartition(" in ")[2], FP32)
    tree["optimizer"] |= {"ema_decay": 0.9}
    tree |= {"topology": asdict(topology), "schedule": {"name": schedule}, "precision": precision}
    tree["training"] |= {"run_dir": str(run), "tokens": steps * LENGTH * BATCH, "sample_tokens": 0, "evaluate_every": 0}
    tree["training"] |= {"seed": SEED}
    tree["training"] |= training
    return tree


def groups_of(world: World, config: RunConfig) -> ProcessGroups:
    return ProcessGroups.create(
        config.topology, world.rank, timedelta(seconds=60), build_stage_layout(config).replica_pp_groups()
    )


def share_of(pieces: Iterable[TensorPiece]) -> Share:
    return [(p.name, p.shape, p.flat.dtype, p.element_offset, bytes(tensor_as_bytes(p.flat))) for p in pieces]


def train_on(world: World, tree: dict[str, Any]) -> Share:
    """Train to the end; return this rank's state."""
    config, ranks = build_dataclass(RunConfig, tree), []

    def build_and_keep(*arguments: Any) -> RankResources:
        ranks.append(build_rank_resources(*arguments))
        return ranks[-1]

    with patch.object(loop, "build_rank_resources", build_and_keep):
        attempt = f"{world.size} ranks to {config.training.tokens}"  # a launch keeps its number of ranks
        loop.train(config, groups_of(world, config), torch.device("cpu"), attempt)
    return share_of(ranks[0].local_checkpoint_pieces())


State = dict[str, str]
"""SHA-256 of each canonical tensor."""


def whole(shares: list[Share]) -> dict[str, Tensor]:
    """Merge the shares of all ranks, flattened; pieces that several hold are equal on all of them."""
    found: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, int] = {}
    for share in shares:
        for name, shape, dtype, first, raw in share:
            piece = torch.frombuffer(bytearray(raw), dtype=dtype)
            assert sizes.setdefault(name, math.prod(shape)) == math.prod(shape), name
            assert torch.equal(found.setdefault(name, {}).setdefault(first, piece), piece), name
    merged = {name: torch.cat([pieces[first] for first in sorted(pieces)]) for name, pieces in found.items()}
    assert {name: tensor.numel() for name, tensor in merged.items()} == sizes
    return merged


def digests(shares: list[Share]) -> State:
    return {name: hashlib.sha256(tensor_as_bytes(tensor)).hexdigest() for name, tensor in whole(shares).items()}


def run(root: Path, directory: Path, layout: str, steps: int, **training: Any) -> State:
    size = LAYOUTS[layout][0].world_size
    return digests(run_processes(size, train_on, tree_of(root, directory, layout, steps, **training), timeout=120))


def losses(directory: Path) -> list[float]:
    events = read_metrics(directory / "metrics.jsonl")
    return [float(str(event.values["loss/total"])) for event in events if event.kind == "step"]
