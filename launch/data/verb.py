"""`shoestring data`: prepare a corpus as token shards, and inspect them."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...comm.errors import escape_unprintable
from ..answers.blocks import Answer, Block, Paragraph, PreformattedText, records_table
from ..answers.options import add_answer_options, add_override_arguments, print_answer

if TYPE_CHECKING:
    from ...trainer.data.inspect import SplitDescription


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's actions with their options."""
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser("prepare", help="write the tokens of a corpus, with its tokenizer or a new one")
    add_override_arguments(prepare)
    _add_executor_arguments(prepare)
    preview = actions.add_parser("preview", help="show the first samples of a run, decoded, with control tokens marked")
    preview.add_argument("--samples", type=int, default=3, metavar="N", help="number of samples (default 3)")
    inspect = actions.add_parser("inspect", help="describe prepared data")
    tokenizer = actions.add_parser("tokenizer", help="describe the tokenizer, and encode a text with it")
    tokenizer.add_argument("--text", default="", metavar="TEXT", help="text to encode")
    for parser in (inspect, preview, tokenizer):
        add_override_arguments(parser)
        add_answer_options(parser)


def _add_executor_arguments(parser: argparse.ArgumentParser) -> None:
    words = "run the tasks by this executor of datatrove (pip install datatrove)"
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], help=words)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of the executor's jobs (default 1)")
    words = "argument of the executor's constructor, such as partition=cpu; may be given several times"
    parser.add_argument("--executor-option", action="append", default=[], metavar="KEY=VALUE", help=words)


def run(options: argparse.Namespace) -> int:
    """Prepare the data of the configuration, or only inspect them, and print their description."""
    from ..compose import compose_run_config

    run_config = compose_run_config(options.overrides, options.config_dir)
    config = run_config.data
    if options.action == "inspect":
        return print_answer(options, inspect_answer(Path(config.prepared)))
    if options.action == "preview":
        from .preview import preview_answer

        return print_answer(options, preview_answer(run_config, options.samples))
    if options.action == "tokenizer":
        from .tokenizer import tokenizer_answer

        return print_answer(options, tokenizer_answer(config, options.text))
    from ..answers.terminal import terminal_text
    from ..console import print_to_stdout
    from .prepare import prepare

    if not prepare(options, run_config):
        return 0
    # Without colors, whose codes print_to_stdout would show as text.
    print_to_stdout(terminal_text(inspect_answer(Path(config.prepared)), colors=False))
    return 0


def inspect_answer(directory: Path) -> Answer:
    """Return sizes, hashes and the first text of prepared data. Raises `ConfigError` for damaged files."""
    from ...trainer.data.inspect import describe_prepared_data

    found = describe_prepared_data(directory)
    data, columns = asdict(found), ("documents", "tokens", "bytes", "bytes_per_token", "shards", "unigram_entropy")
    headings = (
        {"name": "split"} | {key: key.replace("_per_", "/") for key in columns} | {"unigram_entropy": "unigram nats"}
    )
    formats = {"bytes_per_token": "{:.3f}".format, "unigram_entropy": "{:.4f}".format}
    blocks: list[Block] = [
        Paragraph(
            f"{found.directory}: {found.vocab_size} token ids, {found.dtype} shards, "
            f"license {found.license or 'not given'}"
        ),
        PreformattedText("", f"content hash  {found.digest}"),
        records_table("", headings, data["splits"], formats),
        *(Paragraph(f"{split.name}: {_list_files(split)}") for split in found.splits),
        PreformattedText("Start of the training text:", escape_unprintable(found.excerpt)),
    ]
    return Answer.from_blocks(f"Prepared data in {directory}", data, blocks)


def _list_files(split: "SplitDescription") -> str:
    more = split.files - len(split.first_files)
    return ", ".join(split.first_files) + (f", and {more} more" if more else "")
