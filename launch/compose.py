"""Hydra: from groups of files and overrides on the command line to one typed `RunConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..comm.refusal import Problem, Refused, refuse_if_any
from ..trainer.config import RunConfig
from .typed import build


def compose_run(overrides: Sequence[str], config_dir: Path | None = None) -> RunConfig:
    """The configuration that `overrides` describe, such as `experiment=quickstart` and `training.seed=1`.

    Groups are looked up in `config_dir` too, where it is given. Raises `Refused` with every problem that can be seen
    without disk or processes.
    """
    with initialize_config_module("shoestring.conf", version_base="1.3"):
        parsed = _parse(overrides)
        searchpath = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.absolute()}]"]
        refuse_if_any(_group_problems(parsed, config_dir))
        # Values may name keys that do not exist: they are added, and the typed build below names them all at once.
        lines = [
            (o.input_line or "").lstrip("+")
            if _choices(o.key_or_group, config_dir)
            else f"++{(o.input_line or '').lstrip('+')}"
            for o in parsed
        ]
        try:
            tree = OmegaConf.to_container(compose("config", [*searchpath, *lines]), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise Refused([Problem("command line", " ".join(overrides), str(error))]) from error
    config = build(RunConfig, tree)
    refuse_if_any(config.problems())
    return config


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, every default written out; it can be read back with `--config-dir`."""
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(config)))


def to_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for JSON."""
    tree: dict[str, Any] = _plain(config)
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return {key: _plain(item) for key, item in vars(value).items()}


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            problems.append(Problem("command line", text, "is not an override; write key=value or group=choice"))
    refuse_if_any(problems)
    return parsed


def _choices(group: str, config_dir: Path | None) -> list[str]:
    """Names of the files of a group; empty where `group` is none."""
    shipped: list[str] = GlobalHydra.instance().config_loader().get_group_options(group)
    own = [] if config_dir is None else [path.stem for path in (config_dir / group).glob("*.yaml")]
    return sorted({*shipped, *own})


def _group_problems(parsed: Sequence[Override], config_dir: Path | None) -> list[Problem]:
    problems = []
    for override in parsed:
        choices = _choices(override.key_or_group, config_dir)
        choice = override.value()
        if choices and choice not in choices:
            close = difflib.get_close_matches(str(choice), choices, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            problems.append(
                Problem(override.key_or_group, choice, f"no such file; {hint}there are: {', '.join(choices)}")
            )
    return problems
