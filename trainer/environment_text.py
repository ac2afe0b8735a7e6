"""Text of a configuration that comes from environment variables, and so may be a secret: files hold its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class EnvironmentText(str):
    """A resolved text that remembers the interpolation, such as `${oc.env:TEAM}/runs`, that it comes from.

    `copy`, `dataclasses.replace` and `dataclasses.asdict` keep it; its `repr`, and so every refusal, shows the source.
    """

    source: str

    def __new__(cls, text: str, source: str) -> EnvironmentText:
        """Make one of the resolved `text`."""
        made = super().__new__(cls, text)
        made.source = source
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # for copies: `__new__` wants both
        return str(self), self.source

    def __repr__(self) -> str:
        return repr(self.source)


def as_written(value: Any) -> Any:
    """Return nested plain values as files may hold them: every `EnvironmentText` replaced by its source."""
    if isinstance(value, EnvironmentText):
        return value.source
    if isinstance(value, Mapping):
        return {key: as_written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_written(item) for item in value]
    return value
