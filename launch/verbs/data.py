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
    add_override_arguments(actions.add_parser("prepare", help="train the tokenizer and write token shards"))
    inspect = actions.add_parser("inspect", help="describe prepared data")
    add_override_arguments(inspect)
    add_answer_options(inspect)


def run(options: argparse.Namespace) -> int:
    """Prepare the data of the configuration, or only inspect them, and print their description."""
    from ..compose import compose_run_config

    run_config = compose_run_config(options.overrides, options.config_dir)
    config = run_config.data
    if options.action == "inspect":
        return print_answer(options, inspect_answer(Path(config.prepared)))
    from ...trainer.checkpoint.tokenizer import find_tokenizer
    from ...trainer.data.preparation.prepare import prepare_corpus
    from ..answers.terminal import terminal_text
    from ..console import print_to_stdout
    from ..signal_cleanup import clean_up_on_signal

    with clean_up_on_signal("data prepare"):
        prepare_corpus(config, print_to_stdout, tokenizer=find_tokenizer(run_config))
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
