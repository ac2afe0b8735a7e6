"""Interpolations in a configuration: resolved once per launch (`${now:…}`) or in each process (`${oc.env:…}`).

`${now:…}` is resolved when a run is composed. `${oc.env:…}` may hold a secret, so files keep its source: the value is
an `InterpolatedText`, which stores both. Numbers and choices hold no secrets.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ..comm.errors import Problem
from ..trainer.structured_config import InterpolatedText, map_texts

_NOW = re.compile(r"(?<!\\)((?:\\\\)*)\$\{now:([^{}]*)\}")
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_CHOICES = ("model.", "exchange.", "precision.", "optimizer.", "schedule.", "recompute.", "topology.")
"""Groups whose text is one of a list of names. Checkpoints are compared by them, so they hold the resolved value."""


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
