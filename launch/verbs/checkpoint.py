"""`shoestring checkpoint`: which checkpoints a run has, whether they are whole, and where two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context
from ...comm.files.strict_json import JsonValue
from ...trainer.checkpoint.checkpoint import Checkpoint
from ...trainer.checkpoint.find import (
    find_checkpoint,
    find_checkpoint_directory,
    open_checkpoint_store,
    unreadable_checkpoint_error,
)
from ...trainer.checkpoint.manifest import MANIFEST_FILE, CheckpointDamaged, read_manifest_only, read_manifest_summary


@dataclass(frozen=True)
class CheckpointListing:
    """A directory of a store, as `ls` shows it."""

    name: str
    state: str
    """`whole` (from outside: marker, manifest and sizes), `damaged: …`, `unfinished` or `set aside`."""
    step: int | None = None
    bytes: int | None = None
    tensors: int | None = None
    ranks: int | None = None
    layout: str | None = None


@dataclass(frozen=True)
class VerificationResult:
    """What `verify_checkpoint` has found of one checkpoint."""

    path: str
    tensors: int | None
    """None where the manifest itself is damaged."""
    bytes: int | None
    """Of all files, as the manifest says."""
    damage: list[str]
    """Words about each file, header or piece that is damaged; empty for a whole checkpoint."""

    @property
    def report_text(self) -> str:
        """For the terminal."""
        if self.damage:
            return "\n".join(self.damage)
        return f"{self.path}: {self.tensors:,} tensors, {self.bytes:,} bytes, every hash and every header is right"


@dataclass(frozen=True)
class CheckpointDiff:
    """What two checkpoints have in common of one kind of state, and what not."""

    kind: str
    tensors: int
    """In both."""
    equal: int
    """To the last bit."""
    only_first: int
    only_second: int
    reshaped: int
    """Of another shape or dtype."""
    largest: float
    """Largest absolute difference of an element."""
    where: str
    """In which tensor."""


def list_checkpoints(path: Path) -> list[CheckpointListing]:
    """Everything in the store of a run, oldest first. Raises `ConfigError` where there is none."""
    directory = open_checkpoint_store(path).directory
    if not directory.is_dir():
        raise ConfigError([Problem("checkpoint", str(path), "is no directory; name a run's")])
    found = [_listed(each) for each in sorted(directory.glob("step_*"))]
    if not found:
        raise ConfigError([Problem("checkpoint", str(directory), "holds no checkpoint")])
    return found


def checkpoints_table(listed: list[CheckpointListing]) -> Table:
    """For the terminal."""
    table = Table(box=None)
    for heading in ("checkpoint", "tensors", "MB", "saved by", "state"):
        table.add_column(heading, justify="right" if heading in ("tensors", "MB") else "left")
    for each in listed:
        numbers = ("", "", "") if each.bytes is None else (f"{each.tensors:,}", f"{each.bytes / 1e6:,.1f}", each.layout)
        table.add_row(each.name, *(number or "" for number in numbers), each.state)
    return table


def verify_checkpoint(path: Path, step: int | None) -> VerificationResult:
    """Read every byte of a checkpoint. Raises `ConfigError` where there is none, or none that can be read now."""
    try:
        directory = find_checkpoint_directory(path, step)
        try:
            checkpoint = Checkpoint(directory, read_manifest_only(directory))
        except CheckpointDamaged as damaged:
            words = f"{damaged}; nothing more can be checked: restore that file, or --step takes another checkpoint"
            return VerificationResult(str(directory), None, None, [words])
        manifest = checkpoint.manifest
        return VerificationResult(
            str(directory), len(manifest.tensors), manifest.total_bytes, list(checkpoint.find_damage())
        )
    except OSError as error:
        raise unreadable_checkpoint_error(error) from error


def diff_checkpoints(
    first: Path, second: Path, steps: tuple[int | None, int | None]
) -> tuple[list[str], list[CheckpointDiff]]:
    """Where two checkpoints differ: metadata and configuration a line each, tensors by kind of state."""
    one, two = find_checkpoint(first, steps[0]), find_checkpoint(second, steps[1])
    try:
        return list(_metadata_differences(one.manifest.metadata, two.manifest.metadata)), list(_differences(one, two))
    except CheckpointDamaged as damaged:
        hint = "is damaged; `shoestring checkpoint verify` says more"
        raise ConfigError([Problem("checkpoint", str(damaged), hint)]) from damaged


def diff_table(differences: list[CheckpointDiff]) -> Table:
    """For the terminal."""
    table = Table(box=None)
    for heading in ("state", "in both", "equal", "only 1st", "only 2nd", "reshaped", "largest Δ"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    table.add_column("in", overflow="fold")
    for each in differences:
        values = list(asdict(each).values())
        table.add_row(*map(str, values[:6]), f"{each.largest:.3g}", each.where)
    return table


def _listed(path: Path) -> CheckpointListing:
    if path.suffix in (".partial", ".old"):
        return CheckpointListing(path.name, "unfinished; the next save clears it")
    if path.suffix == ".damaged":
        return CheckpointListing(path.name, "set aside by a run that found it damaged")
    try:
        return _whole(path)
    except CheckpointDamaged as damaged:
        return CheckpointListing(path.name, f"damaged: {damaged}")
    except ConfigError as refused:
        return CheckpointListing(path.name, str(refused))
    except OSError as error:
        return CheckpointListing(path.name, f"cannot be read now: {error}")


def _whole(path: Path) -> CheckpointListing:
    outline = read_manifest_summary(path)
    with config_error_context(path / MANIFEST_FILE, "take another checkpoint"):
        metadata = JsonValue(outline.metadata, "metadata")
        grid, layout = metadata["config"].get("topology"), "an import"
        if grid is not None:
            layout = " ".join(f"{axis}{_size(grid, axis)}" for axis in ("pp", "edp", "ep"))
        step = metadata["step"].as_integer()
    return CheckpointListing(
        path.name, "whole", step, outline.total_bytes, outline.num_tensors, outline.num_tensor_files, layout
    )


def _size(grid: JsonValue, axis: str) -> int:
    found = grid.get(axis)
    return 1 if found is None else found.as_integer(1)


def _metadata_differences(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(one.keys() | two.keys()):
        name, a, b = f"{prefix}{key}", one.get(key), two.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _metadata_differences(a, b, f"{name}.")
        elif a != b:
            yield f"{name}: {a!r} | {b!r}"


def _differences(one: Checkpoint, two: Checkpoint) -> Iterator[CheckpointDiff]:
    names = sorted(one.manifest.tensors.keys() | two.manifest.tensors.keys())
    for kind in dict.fromkeys(name.partition("/")[0] for name in names):
        own = [name for name in names if name.partition("/")[0] == kind]
        both = [name for name in own if not one.missing_tensors([name]) and not two.missing_tensors([name])]
        equal = reshaped = 0
        largest, where = 0.0, ""
        for name in both:
            a, b = one.read_tensor(name), two.read_tensor(name)
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                reshaped += 1
                continue
            equal += bool((a == b).all())
            difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            if difference > largest:
                largest, where = difference, name
        only = len(one.missing_tensors(own)), len(two.missing_tensors(own))
        yield CheckpointDiff(kind, len(both), equal, only[1], only[0], reshaped, largest, where)
