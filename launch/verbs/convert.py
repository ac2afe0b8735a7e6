"""`shoestring import` and `shoestring export`: to and from a directory that transformers, vLLM and others read."""

from __future__ import annotations

from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ...trainer.checkpoint.find import find_checkpoint
from ...trainer.huggingface.export import ExportOptions, export
from ...trainer.huggingface.importing import import_released
from ..making import cleaning_up
from ..say import tell

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export_command(
    path: Path, step: int | None, directory: Path, dtype: str, rope: str, shard: str, *, average: bool
) -> Path:
    """Export one checkpoint, or the average of its weights; return it. Raises `ConfigError`."""
    options = ExportOptions(dtype, rope == "pairs", read_size(shard))
    checkpoint = find_checkpoint(path, step)
    with cleaning_up("export"):
        export(checkpoint.averaged() if average else checkpoint, directory, options, tell)
    return checkpoint.path


def import_command(source: Path, target: Path) -> Path:
    """Import a directory; return the checkpoint. Raises `ConfigError`."""
    with cleaning_up("import"):
        return import_released(source, target, tell)


def read_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` or `64KB`. Raises `ConfigError`."""
    try:
        number, factor = float(text[:-2]), _UNITS[text[-2:].upper()]
        if number > 0:
            return round(number * factor)
    except (ValueError, KeyError):
        pass
    raise ConfigError([Problem("--max-shard", text, "must be a size such as 5GB, 500MB or 64KB")])
