"""`shoestring import` and `shoestring export`: conversion from and to Hugging Face directories (transformers, vLLM)."""

from __future__ import annotations

from pathlib import Path

from ...comm.units import parse_byte_size
from ...trainer.checkpoint.find import find_checkpoint
from ...trainer.huggingface.export import ExportOptions, export_checkpoint
from ...trainer.huggingface.import_weights import import_huggingface_weights
from ..console import print_to_stdout
from ..signal_cleanup import clean_up_on_signal


def export_command(
    path: Path, step: int | None, directory: Path, dtype: str, rope: str, shard: str, *, ema_weights: bool
) -> Path:
    """Export the weights of one checkpoint, or their EMA; return its path. Raises `ConfigError`."""
    options = ExportOptions(dtype, rope == "pairs", parse_byte_size(shard, "--max-shard"))
    checkpoint = find_checkpoint(path, step)
    with clean_up_on_signal("export"):
        export_checkpoint(
            checkpoint.with_ema_weights() if ema_weights else checkpoint, directory, options, print_to_stdout
        )
    return checkpoint.path


def import_command(source: Path, target: Path) -> Path:
    """Import a directory; return the path of the checkpoint. Raises `ConfigError`."""
    with clean_up_on_signal("import"):
        return import_huggingface_weights(source, target, print_to_stdout)
