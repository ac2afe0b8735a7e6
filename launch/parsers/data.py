"""`data`: a corpus made into token shards, and looked at."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Verbs, add_actions, described, with_overrides


def add(verbs: Verbs) -> None:
    """Add this family's verb."""
    actions = add_actions(verbs.add_parser("data", help="prepare a corpus, look at a prepared one"))
    prepare = with_overrides(actions.add_parser("prepare", help="train the tokenizer and write token shards"))
    prepare.set_defaults(run=_prepare)
    inspect = with_overrides(actions.add_parser("inspect", help="what is in them"))
    inspect.set_defaults(run=_inspect)


def _prepare(options: argparse.Namespace) -> int:
    from ...trainer.data.prepare import prepare
    from ..compose import compose_run
    from ..making import cleaning_up
    from ..say import tell

    config = compose_run(*described(options)).data
    with cleaning_up("data prepare"):
        prepare(config, tell)
    _describe(config.prepared)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ..compose import compose_run

    _describe(compose_run(*described(options)).data.prepared)
    return 0


def _describe(prepared: str) -> None:
    from ...trainer.data.inspect import describe, render
    from ..say import tell

    tell(render(describe(Path(prepared))))
