"""Compose configuration groups and command-line overrides into one typed `RunConfig`, with Hydra.

`${now:…}` is resolved when a run is composed, `${oc.env:…}` in each process. The latter may hold a secret, so files
keep its source: the value is an `InterpolatedText`, which stores both. Numbers and choices hold no secrets.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..comm.errors import ConfigError, Problem, UnreadableFields, collect_problems, raise_if_any
from ..comm.files.file_io import config_error_context, os_error_to_problem
from ..comm.files.strict_json import MalformedFileError, shorten_for_message
from ..comm.files.strict_yaml import read_checked_yaml_text, read_yaml
from ..trainer.config import RunConfig
from ..trainer.huggingface.config import remove_released_keys
from ..trainer.structured_config import InterpolatedText, build_dataclass, map_texts, parse_dataclass
from .console import print_to_stderr

_RESOLVER_ERRORS = (ValueError, TypeError, KeyError, AttributeError, OSError)
"""Exceptions that resolvers and merges of Hydra and OmegaConf do not catch for values of an unexpected type."""
_GLOBAL_PACKAGE = "# @package _global_"
"""Hydra's directive for a file whose keys are top-level keys, as an experiment's, instead of keys of its group."""
_NOW = re.compile(r"(?<!\\)((?:\\\\)*)\$\{now:([^{}]*)\}")
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_CHOICES = ("model.", "exchange.", "precision.", "optimizer.", "schedule.", "recompute.", "topology.")
"""Groups whose text is one of a list of names. Checkpoints are compared by them, so they hold the resolved value."""


def compose_run_config(
    overrides: Sequence[str],
    config_dir: Path | None = None,
    now: datetime | None = None,
    unchecked: Collection[str] = (),
) -> RunConfig:
    """Return the configuration that `overrides` describe, such as `experiment=quickstart` and `training.seed=1`.

    Groups are looked up in `config_dir` too, if given; `${now:…}` is `now`, by default the current time. Raises
    `ConfigError` with every problem that can be found without disk or processes, except those with the values of the
    keys `unchecked`. Only `model.vocab_size: null` reads a tokenizer or checkpoint.
    """
    problems: list[Problem] = []
    with initialize_config_module("shoestring.conf", version_base="1.3"):
        problems += _directory_problems(config_dir)
        if unreadable := list(_unreadable_files(config_dir)):  # Hydra would load them without end, or fail
            raise ConfigError([*problems, *unreadable])
        parsed = [(text, list(_hydra_override(text, config_dir, problems))) for text in overrides]
        lines = [line for _, read_as in parsed for line in read_as]
        tree = _compose(lines, config_dir, now or datetime.now().astimezone(), problems)
    unread = {_key(text) for text, read_as in parsed if not read_as}
    if {"--config-dir", "experiment"} & (unread | {problem.field for problem in problems}):
        unread.add("")  # their files could have set anything
    for key, text in texts_by_key(tree):
        if "\0" in text:  # no file name and no environment variable can hold it
            problems.append(Problem(key, text, "contains a NUL character; remove it"))
    if isinstance(model := tree.get("model"), dict):
        found, ignored = remove_released_keys(model)
        problems += found
        if ignored:
            print_to_stderr(f"model: keys of config.json without effect here (see docs/model.md): {', '.join(ignored)}")
    unread |= _resolve_vocab_size(tree, problems)
    config, doubtful = parse_dataclass(RunConfig, tree, problems)
    unreadable_fields = UnreadableFields(
        doubtful | unread | set(unchecked), frozenset(_key(text) for text, read_as in parsed if read_as)
    )
    raise_if_any([*problems, *config.problems(unreadable_fields)])
    return config


def _resolve_vocab_size(tree: dict[str, Any], problems: list[Problem]) -> set[str]:
    """Replace `model.vocab_size: null` by the number of token ids of the tokenizer, or the rows of `start_from`.

    Where that is not known the key is left out, and returned as one that could not be read.
    """
    model, data, training = (tree.get(group) for group in ("model", "data", "training"))
    if not isinstance(model, dict) or "vocab_size" not in model or model["vocab_size"] is not None:
        return set()
    # Only here: most commands need neither library.
    from ..trainer.checkpoint.find import find_checkpoint
    from ..trainer.data.tokenizer import count_token_ids

    del model["vocab_size"]
    data, training = (group if isinstance(group, dict) else {} for group in (data, training))
    with collect_problems(problems):
        if isinstance(training.get("start_from"), str):
            model["vocab_size"] = find_checkpoint(Path(training["start_from"])).model_config.vocab_size
        elif isinstance(data.get("tokenizer"), str):
            model["vocab_size"] = count_token_ids(Path(data["tokenizer"]))
        elif type(data.get("vocab_size")) is int:
            model["vocab_size"] = data["vocab_size"]
    return set() if "vocab_size" in model else {"model.vocab_size"}


def config_to_yaml(config: RunConfig) -> str:
    """Return the whole configuration with every default; interpolations of the environment are not resolved.

    `read_config` reads it. Saved as `DIR/experiment/NAME.yaml` it is used with `--config-dir DIR experiment=NAME`.
    """
    return f"{_GLOBAL_PACKAGE}\n{OmegaConf.to_yaml(OmegaConf.create(escape_interpolations(config_to_dict(config))))}"


def read_config(path: Path) -> RunConfig:
    """Read what `config_to_yaml` wrote, and resolve interpolations of the environment. Raises `ConfigError`."""
    problems: list[Problem] = []
    with config_error_context(path, "it holds the run's configuration; restore it"):
        text = read_checked_yaml_text(path)
    try:
        tree = resolve_interpolations(OmegaConf.load(StringIO(text)), problems, datetime.now().astimezone())
    except (OmegaConfBaseException, YAMLError, RecursionError, *_RESOLVER_ERRORS) as error:
        raise ConfigError([Problem(str(path), None, f"cannot be read or resolved: {error}")]) from error
    return build_dataclass(RunConfig, tree, problems)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested plain values, for JSON."""
    return dict(map_texts(asdict(config), lambda text: text))


def escape_interpolations(value: Any) -> Any:
    """Escape every `${` in `value`, so that OmegaConf reads it as text, except in an `InterpolatedText`."""

    def escape(text: str) -> str:
        return text.source if isinstance(text, InterpolatedText) else re.sub(r"(\\*)\$\{", r"\1\1\\${", text)

    return map_texts(value, escape)


def _compose(lines: Sequence[str], config_dir: Path | None, now: datetime, problems: list[Problem]) -> dict[str, Any]:
    searchpath = []
    if config_dir is not None and config_dir.is_dir():
        quoted = str(config_dir.absolute()).replace("'", r"\'")
        searchpath = [f"hydra.searchpath=['file://{quoted}']"]
    try:
        composed = compose("config", [*searchpath, *lines])
        tree = resolve_interpolations(composed, problems, now)
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError, *_RESOLVER_ERRORS) as error:
        text = " ".join(line.removeprefix("++") for line in lines)
        raise ConfigError([*problems, Problem("command line", text, str(error))]) from error
    assert isinstance(tree, dict)
    if "experiment" in tree:
        hint = f"these keys are under `experiment`; the first line of its file must be: {_GLOBAL_PACKAGE}"
        problems.append(Problem("experiment", tree.pop("experiment"), hint))
    return tree


def _hydra_override(text: str, config_dir: Path | None, problems: list[Problem]) -> Iterator[str]:
    """Yield `text` as an override for Hydra, or add to `problems` if it would fail or have no effect."""
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except (HydraException, RecursionError):
        problems.append(_malformed(text))
        return
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        problems.append(Problem("command line", shorten_for_message(text), "contains a number with too many digits"))
        return
    choices = _choices(override.key_or_group, config_dir)
    found = _override_problem(text, override, choices)
    if found is not None:
        problems.append(found)
    elif choices:
        yield text.lstrip("+")
    else:  # a key that does not exist is added, and the typed build names it with all the others
        yield f"++{text.lstrip('+')}"


def _key(text: str) -> str:
    """Return the key that an override sets; the empty key stands for the whole configuration."""
    return text.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")


def _malformed(text: str) -> Problem:
    return Problem("command line", text, "is not an override; write key=value or group=choice; quote text with signs")


def _override_problem(text: str, override: Override, choices: Sequence[str]) -> Problem | None:
    key, choice = override.key_or_group, override.value()
    if not key:
        return _malformed(text)
    if override.is_delete():
        return Problem("command line", text, "a key cannot be deleted; write key=value")
    if override.is_sweep_override():
        return Problem("command line", text, "a run has one value per key; write a list as key=[a,b]")
    if key.replace("/", ".").split(".")[0] == "hydra":
        return Problem(key, choice, "Hydra only composes the configuration: its settings have no effect here")
    if choices and choice not in choices:
        close = difflib.get_close_matches(str(choice), choices, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return Problem(key, choice, f"no such file; {hint}there are: {', '.join(choices)}")
    return None


def _choices(group: str, config_dir: Path | None) -> list[str]:
    """Return the names of the files of a group; empty if `group` is not a group."""
    from_user = [] if config_dir is None else [path.stem for path in (config_dir / group).glob("*.yaml")]
    return sorted({*_package_choices(group), *from_user})


def _package_choices(group: str) -> list[str]:
    options: list[str] = GlobalHydra.instance().config_loader().get_group_options(group)
    return options


def _unreadable_files(config_dir: Path | None) -> Iterator[Problem]:
    """Yield a problem per file of `config_dir` that could be chosen and cannot be read as YAML."""
    for path in sorted([] if config_dir is None else config_dir.glob("*/*.yaml")):
        if not _package_choices(path.parent.name):
            continue
        try:
            read_yaml(path, resolve=False)
        except MalformedFileError as error:
            yield error.to_problem(path, "correct the file, or remove it")
        except OSError as error:
            yield os_error_to_problem(error, path, "make it readable, or remove it")


def _directory_problems(config_dir: Path | None) -> Iterator[Problem]:
    """Yield a problem for a missing directory, and for each file in it that could never be chosen."""
    if config_dir is None:
        return
    if not config_dir.is_dir():
        yield Problem("--config-dir", str(config_dir), "is not a directory")
    for path in sorted(config_dir.glob("*/*.yaml")):
        if path.stem in _package_choices(path.parent.name):
            hint = "has the name of a file of the package, which takes precedence; rename it"
            yield Problem("--config-dir", str(path), hint)


def resolve_interpolations(config: DictConfig | ListConfig, problems: list[Problem], now: datetime) -> Any:
    """Return `config` as nested plain values with all interpolations resolved: `${now:…}` is `now`.

    Text that may come from the environment is an `InterpolatedText`. Raises OmegaConf's errors for an interpolation
    that cannot be resolved; lists from the environment are added to `problems`.
    """

    def resolve_now(text: str) -> str:
        return _NOW.sub(lambda match: match.group(1) + now.strftime(match.group(2)), text)

    raw = map_texts(OmegaConf.to_container(config, resolve=False), resolve_now)
    resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True, throw_on_missing=True)
    if not any(_ENVIRONMENT.search(text) for _, text in texts_by_key(raw)):
        return resolved
    return _joined(raw, resolved, "", problems)


def texts_by_key(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every text in nested plain values; the key of a list's item ends with its index."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from texts_by_key(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts_by_key(item, f"{key}[{index}]")


def _joined(raw: Any, resolved: Any, path: str, problems: list[Problem]) -> Any:
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {key: _joined(raw.get(key), item, f"{path}{key}.", problems) for key, item in resolved.items()}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [_joined(*pair, path, problems) for pair in zip(raw, resolved, strict=True)]
    if not isinstance(raw, str) or "${" not in raw:
        return resolved
    key = path.removesuffix(".")
    if isinstance(resolved, dict | list) and _ENVIRONMENT.search(raw):
        problems.append(Problem(key, raw, "only text and numbers can come from the environment; write it out"))
    if not isinstance(resolved, str) or (path.startswith(_CHOICES) and key != "model.name"):
        return resolved
    # A reference to another key may lead to an environment variable elsewhere in the configuration.
    return InterpolatedText(resolved, raw)
