"""Verb `data`: prepare a corpus as token shards, and inspect them."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Subparsers, add_override_arguments, add_subcommands, get_overrides


def add_commands(verbs: Subparsers) -> None:
    """Add this family's verbs."""
    actions = add_subcommands(verbs.add_parser("data", help="prepare a corpus, or inspect a prepared one"))
    prepare_corpus = add_override_arguments(
        actions.add_parser("prepare", help="train the tokenizer and write token shards")
    )
    prepare_corpus.set_defaults(run=_prepare)
    inspect = add_override_arguments(actions.add_parser("inspect", help="describe prepared data"))
    inspect.set_defaults(run=_inspect)


def _prepare(options: argparse.Namespace) -> int:
    from ...trainer.data.prepare import prepare_corpus
    from ..compose import compose_run_config
    from ..console import print_to_stdout
    from ..signal_cleanup import clean_up_on_signal

    config = compose_run_config(*get_overrides(options)).data
    with clean_up_on_signal("data prepare"):
        prepare_corpus(config, print_to_stdout)
    _describe(config.prepared)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ..compose import compose_run_config

    _describe(compose_run_config(*get_overrides(options)).data.prepared)
    return 0


def _describe(prepared: str) -> None:
    from ...trainer.data.inspect import describe_prepared_data, render_description
    from ..console import print_to_stdout

    print_to_stdout(render_description(describe_prepared_data(Path(prepared))))
