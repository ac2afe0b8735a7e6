"""Checkpoints in words and numbers: a run's list, damage of one, differences of two."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context
from ...comm.files.strict_json import JsonValue
from .checkpoint import Checkpoint
from .find import find_checkpoint, find_checkpoint_directory, open_checkpoint_store, unreadable_checkpoint_error
from .manifest import MANIFEST_FILE, CheckpointDamaged, damage_error_context, read_manifest, read_manifest_summary


@dataclass(frozen=True)
class CheckpointListing:
    """Directory of a checkpoint store, as `ls` shows it."""

    name: str
    state: str
    """`complete` (marker, manifest, file sizes), `damaged`, `refused`, `unreadable`, `unfinished` or `quarantined`."""
    reason: str = ""
    """Reason for any state but `complete`."""
    step: int | None = None
    bytes: int | None = None
    tensors: int | None = None
    ranks: int | None = None
    layout: str | None = None


@dataclass(frozen=True)
class VerificationResult:
    """Result of verifying one checkpoint."""

    path: str
    tensors: int | None
    """None if the manifest is damaged."""
    bytes: int | None
    """Bytes of all files, from the manifest."""
    damage: list[str]
    """One line per damaged file, header or piece; empty for an intact checkpoint."""


@dataclass(frozen=True)
class CheckpointDiff:
    """Differences of two checkpoints in one kind of state."""

    kind: str
    tensors: int
    """Tensors in both."""
    equal: int
    """Tensors that are bitwise equal."""
    only_first: int
    only_second: int
    reshaped: int
    """Tensors with another shape or dtype."""
    largest: float
    """Largest absolute difference of an element."""
    where: str
    """Tensor with that difference."""

    @property
    def is_equal(self) -> bool:
        """True if both checkpoints have the same tensors with the same bits."""
        return self.equal == self.tensors and not self.only_first + self.only_second


def list_checkpoints(path: Path) -> list[CheckpointListing]:
    """List the checkpoint directories of a run, oldest first. Raises `ConfigError` if there are none."""
    directory = open_checkpoint_store(path).directory
    if not directory.is_dir():
        raise ConfigError([Problem("checkpoint", str(path), "is not a directory; name the directory of a run")])
    found = [_listed(each) for each in sorted(directory.glob("step_*"))]
    if not found:
        hint = "has no checkpoint; a run saves one every training.checkpoint_every steps"
        raise ConfigError([Problem("checkpoint", str(directory), hint)])
    return found


def verify_checkpoint(path: Path, step: int | None) -> VerificationResult:
    """Read and check every byte of a checkpoint. Raises `ConfigError` if there is none, or it cannot be read now."""
    try:
        directory = find_checkpoint_directory(path, step)
        try:
            checkpoint = Checkpoint(directory, read_manifest(directory, check_sizes=False))
        except CheckpointDamaged as damaged:
            hint = "nothing else can be checked: restore that file, or choose another checkpoint with --step"
            return VerificationResult(str(directory), None, None, [f"{damaged}; {hint}"])
        manifest, damage = checkpoint.manifest, list(checkpoint.find_damage())
        return VerificationResult(str(directory), len(manifest.tensors), manifest.total_bytes, damage)
    except OSError as error:
        raise unreadable_checkpoint_error(error) from error


def diff_checkpoints(
    first: Path, second: Path, steps: tuple[int | None, int | None]
) -> tuple[list[str], list[CheckpointDiff]]:
    """Compare two checkpoints: return one line per different metadata or configuration value, and tensors by kind."""
    one, two = find_checkpoint(first, steps[0]), find_checkpoint(second, steps[1])
    with damage_error_context("is damaged; run `shoestring checkpoint verify` for details"):
        return list(_metadata_differences(one.manifest.metadata, two.manifest.metadata)), list(_differences(one, two))


def _listed(path: Path) -> CheckpointListing:
    if path.suffix in (".partial", ".old"):
        return CheckpointListing(path.name, "unfinished", "the next save deletes it")
    if path.suffix == ".damaged":
        return CheckpointListing(path.name, "quarantined", "renamed by a run that found it damaged")
    try:
        return _complete(path)
    except CheckpointDamaged as damaged:
        return CheckpointListing(path.name, "damaged", str(damaged))
    except ConfigError as refused:
        return CheckpointListing(path.name, "refused", str(refused))
    except OSError as error:
        return CheckpointListing(path.name, "unreadable", f"cannot be read now: {error}")


def _complete(path: Path) -> CheckpointListing:
    outline = read_manifest_summary(path)
    with config_error_context(path / MANIFEST_FILE, "take another checkpoint"):
        metadata = JsonValue(outline.metadata, "metadata")
        grid, layout = metadata["config"].get("topology"), "an import"
        if grid is not None:
            layout = " ".join(f"{axis}{_size(grid, axis)}" for axis in ("pp", "edp", "ep"))
        step = metadata["step"].as_integer()
    return CheckpointListing(
        path.name, "complete", "", step, outline.total_bytes, outline.num_tensors, len(outline.tensor_files), layout
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
        of_kind = [name for name in names if name.partition("/")[0] == kind]
        both = [name for name in of_kind if not one.missing_tensors([name]) and not two.missing_tensors([name])]
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
        only = len(one.missing_tensors(of_kind)), len(two.missing_tensors(of_kind))
        yield CheckpointDiff(kind, len(both), equal, only[1], only[0], reshaped, largest, where)
