"""`shoestring export`: write a checkpoint as a Hugging Face directory (transformers, vLLM)."""

import argparse

from ...comm.units import parse_byte_size
from ...trainer.checkpoint.find import find_checkpoint
from ...trainer.huggingface.export import ExportOptions, export_checkpoint
from ..console import print_to_stdout
from ..signal_cleanup import clean_up_on_signal
from .checkpoint import add_checkpoint_arguments
from .import_weights import named_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_checkpoint_arguments(parser, with_average=True)
    parser.add_argument("directory", type=named_path, metavar="DIRECTORY", help="output directory, new or empty")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32", "fp8"], default="bf16", help="format of the weights (default bf16)"
    )
    words = "rotary layout: interleaved pairs, as DeepSeek's, or halves (default pairs)"
    parser.add_argument("--rope", choices=["pairs", "halves"], default="pairs", help=words)
    parser.add_argument("--max-shard", default="5GB", metavar="SIZE", help="largest file (default 5GB)")


def run(options: argparse.Namespace) -> int:
    """Export the weights of the checkpoint that the options name, or their EMA. Raises `ConfigError`."""
    how = ExportOptions(options.dtype, options.rope == "pairs", parse_byte_size(options.max_shard, "--max-shard"))
    checkpoint = find_checkpoint(options.path, options.step)
    weights, what = (checkpoint.with_ema_weights(), "the EMA weights of ") if options.average else (checkpoint, "")
    with clean_up_on_signal("export"):
        export_checkpoint(weights, options.directory, how, print_to_stdout)
    print_to_stdout(f"Exported {what}{checkpoint.path} to {options.directory}")
    return 0
