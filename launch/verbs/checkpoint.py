"""`shoestring checkpoint`: which checkpoints a run has, whether they are whole, and where two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ...comm.errors import ConfigError, Problem
from ...comm.files.access import refusing
from ...comm.files.strict_json import Item
from ...trainer.checkpoint.find import find_checkpoint, find_directory, store_at, unreadable
from ...trainer.checkpoint.manifest import MANIFEST, Damaged, read_manifest_alone, read_outline
from ...trainer.checkpoint.opened import Checkpoint


@dataclass(frozen=True)
class ListedCheckpoint:
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
class Verified:
    """What `verify` has found of one checkpoint."""

    path: str
    tensors: int | None
    """None where the manifest itself is damaged."""
    bytes: int | None
    """Of all files, as the manifest says."""
    damage: list[str]
    """Words about each file, header or piece that is damaged; empty for a whole checkpoint."""

    @property
    def words(self) -> str:
        """For the terminal."""
        if self.damage:
            return "\n".join(self.damage)
        return f"{self.path}: {self.tensors:,} tensors, {self.bytes:,} bytes, every hash and every header is right"


@dataclass(frozen=True)
class Difference:
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


def list_checkpoints(path: Path) -> list[ListedCheckpoint]:
    """Everything in the store of a run, oldest first. Raises `ConfigError` where there is none."""
    directory = store_at(path).directory
    if not directory.is_dir():
        raise ConfigError([Problem("checkpoint", str(path), "is no directory; name a run's")])
    found = [_listed(each) for each in sorted(directory.glob("step_*"))]
    if not found:
        raise ConfigError([Problem("checkpoint", str(directory), "holds no checkpoint")])
    return found


def checkpoints_table(listed: list[ListedCheckpoint]) -> Table:
    """For the terminal."""
    table = Table(box=None)
    for heading in ("checkpoint", "tensors", "MB", "saved by", "state"):
        table.add_column(heading, justify="right" if heading in ("tensors", "MB") else "left")
    for each in listed:
        numbers = ("", "", "") if each.bytes is None else (f"{each.tensors:,}", f"{each.bytes / 1e6:,.1f}", each.layout)
        table.add_row(each.name, *(number or "" for number in numbers), each.state)
    return table


def verify(path: Path, step: int | None) -> Verified:
    """Read every byte of a checkpoint. Raises `ConfigError` where there is none, or none that can be read now."""
    try:
        directory = find_directory(path, step)
        try:
            checkpoint = Checkpoint(directory, read_manifest_alone(directory))
        except Damaged as damaged:
            words = f"{damaged}; nothing more can be checked: restore that file, or --step takes another checkpoint"
            return Verified(str(directory), None, None, [words])
        manifest = checkpoint.manifest
        return Verified(str(directory), len(manifest.tensors), manifest.bytes, list(checkpoint.damage()))
    except OSError as error:
        raise unreadable(error) from error


def diff(first: Path, second: Path, steps: tuple[int | None, int | None]) -> tuple[list[str], list[Difference]]:
    """Where two checkpoints differ: facts and configuration a line each, tensors by kind of state."""
    one, two = find_checkpoint(first, steps[0]), find_checkpoint(second, steps[1])
    try:
        return list(_facts(one.manifest.facts, two.manifest.facts)), list(_differences(one, two))
    except Damaged as damaged:
        hint = "is damaged; `shoestring checkpoint verify` says more"
        raise ConfigError([Problem("checkpoint", str(damaged), hint)]) from damaged


def diff_table(differences: list[Difference]) -> Table:
    """For the terminal."""
    table = Table(box=None)
    for heading in ("state", "in both", "equal", "only 1st", "only 2nd", "reshaped", "largest Δ"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    table.add_column("in", overflow="fold")
    for each in differences:
        values = list(asdict(each).values())
        table.add_row(*map(str, values[:6]), f"{each.largest:.3g}", each.where)
    return table


def _listed(path: Path) -> ListedCheckpoint:
    if path.suffix in (".partial", ".old"):
        return ListedCheckpoint(path.name, "unfinished; the next save clears it")
    if path.suffix == ".damaged":
        return ListedCheckpoint(path.name, "set aside by a run that found it damaged")
    try:
        return _whole(path)
    except Damaged as damaged:
        return ListedCheckpoint(path.name, f"damaged: {damaged}")
    except ConfigError as refused:
        return ListedCheckpoint(path.name, str(refused))
    except OSError as error:
        return ListedCheckpoint(path.name, f"cannot be read now: {error}")


def _whole(path: Path) -> ListedCheckpoint:
    outline = read_outline(path)
    with refusing(path / MANIFEST, "take another checkpoint"):
        facts = Item(outline.facts, "facts")
        grid, layout = facts["config"].get("topology"), "an import"
        if grid is not None:
            layout = " ".join(f"{axis}{_size(grid, axis)}" for axis in ("pp", "edp", "ep"))
        step = facts["step"].whole()
    return ListedCheckpoint(path.name, "whole", step, outline.bytes, outline.tensors, outline.files, layout)


def _size(grid: Item, axis: str) -> int:
    found = grid.get(axis)
    return 1 if found is None else found.whole(1)


def _facts(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(one.keys() | two.keys()):
        name, a, b = f"{prefix}{key}", one.get(key), two.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _facts(a, b, f"{name}.")
        elif a != b:
            yield f"{name}: {a!r} | {b!r}"


def _differences(one: Checkpoint, two: Checkpoint) -> Iterator[Difference]:
    names = sorted(one.manifest.tensors.keys() | two.manifest.tensors.keys())
    for kind in dict.fromkeys(name.partition("/")[0] for name in names):
        own = [name for name in names if name.partition("/")[0] == kind]
        both = [name for name in own if not one.missing([name]) and not two.missing([name])]
        equal = reshaped = 0
        largest, where = 0.0, ""
        for name in both:
            a, b = one.read(name), two.read(name)
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                reshaped += 1
                continue
            equal += bool((a == b).all())
            difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            if difference > largest:
                largest, where = difference, name
        only = len(one.missing(own)), len(two.missing(own))
        yield Difference(kind, len(both), equal, only[1], only[0], reshaped, largest, where)
