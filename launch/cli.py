"""The `shoestring` command: one verb a purpose."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..comm.refusal import Refused
from .orphan import die_with_launcher

EXIT_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run the verb and exit with its code; 2 for refused input, every problem on a line of its own."""
    die_with_launcher()
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
    except Refused as refused:
        print(f"shoestring {options.verb}: refused", file=sys.stderr)
        for problem in refused.problems:
            print(f"  {problem}", file=sys.stderr)
        code = EXIT_REFUSED
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoestring", description="Pretrain a mixture-of-experts model inside a GPU-hour budget."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = _with_overrides(verbs.add_parser("train", help="train, or go on from the run's last checkpoint"))
    train.add_argument("--fresh", action="store_true", help="delete what an earlier run left in training.run_dir first")
    train.add_argument("--cfg", choices=["job"], help="print the composed configuration instead")
    train.set_defaults(run=_train)

    params = _with_overrides(verbs.add_parser("params", help="parameters and FLOPs a token of a model"))
    params.add_argument("--format", choices=["table", "json"], default="table")
    params.set_defaults(run=_params)

    budget = verbs.add_parser("budget", help="what a run has cost, beside the published 2.788 M GPU-hours")
    budget.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    budget.add_argument("--format", choices=["table", "json"], default="table")
    budget.set_defaults(run=_budget)

    data = verbs.add_parser("data", help="prepare a corpus, look at a prepared one").add_subparsers(
        dest="action", required=True
    )
    for action, text in (("prepare", "train the tokenizer and write token shards"), ("inspect", "what is in them")):
        _with_overrides(data.add_parser(action, help=text)).set_defaults(run=_data)
    return parser


def _with_overrides(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="a directory with configuration groups of your own")
    return parser


def _train(options: argparse.Namespace) -> int:
    if options.cfg:
        from .compose import compose_run, to_yaml

        print(to_yaml(compose_run(options.overrides, options.config_dir)), end="")
        return 0
    from .train import train_command

    return train_command(options.overrides, options.config_dir, fresh=options.fresh)


def _params(options: argparse.Namespace) -> int:
    from .params import params_table, params_tree

    if options.format == "json":
        print(json.dumps(params_tree(options.overrides, options.config_dir), indent=1))
    else:
        _show(params_table(options.overrides, options.config_dir))
    return 0


def _budget(options: argparse.Namespace) -> int:
    from ..trainer.budget.render import render
    from ..trainer.budget.summary import summarise

    summary = summarise(options.run_dir)
    if options.format == "json":
        print(json.dumps(summary.to_json(), indent=1))
    else:
        _show(render(summary))
    return 0


def _data(options: argparse.Namespace) -> int:
    from .compose import compose_run

    config = compose_run(options.overrides, options.config_dir).data
    if options.action == "prepare":
        from ..trainer.data.prepare import prepare

        prepare(config, print)
    from ..trainer.data.inspect import describe, render

    print(render(describe(Path(config.prepared))))
    return 0


def _show(renderable: object) -> None:
    from rich.console import Console

    Console().print(renderable)


if __name__ == "__main__":
    main()
