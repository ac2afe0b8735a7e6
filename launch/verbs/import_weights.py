"""`shoestring import`: create a checkpoint from a Hugging Face directory."""

import argparse
from pathlib import Path

from ...trainer.huggingface.import_weights import import_huggingface_weights
from ..console import print_to_stdout
from ..signal_cleanup import clean_up_on_signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    words = "directory with config.json and safetensors files"
    parser.add_argument("source", type=named_path, metavar="DIRECTORY", help=words)
    parser.add_argument("target", type=named_path, metavar="TARGET", help="directory of the new checkpoint")


def run(options: argparse.Namespace) -> int:
    """Import the directory that the options name. Raises `ConfigError`."""
    with clean_up_on_signal("import"):
        checkpoint = import_huggingface_weights(options.source, options.target, print_to_stdout)
    print_to_stdout(f"Imported to {checkpoint}")
    return 0


def named_path(text: str) -> Path:
    """Convert an argument to a path; an empty one would mean the working directory and is an error."""
    if not text:
        raise argparse.ArgumentTypeError("must name a directory; it is empty")
    return Path(text)
