"""Two errors with clear messages: `ConfigError` for bad input, `CollectiveError` for a failed collective.

`ConfigError` lists all problems, each with field, value and hint. `CollectiveError` names rank, operation and peers.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta


def escape_unprintable(text: str, keep: str = "\n\t") -> str:
    """Replace every character of `text` that is not printable, except those in `keep`, by its escape."""
    # Names of files, tensors and keys come from outside: an ESC in one would control the terminal that shows it.
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Problem:
    """One invalid input.

    `field` is the dotted configuration key or the path of a file; `hint` says what is wrong and what to write instead.
    `related_fields` are other keys that the value contradicts.
    """

    field: str
    value: object
    hint: str
    related_fields: tuple[str, ...] = ()

    def with_prefix(self, prefix: str) -> "Problem":
        """Return a copy with `prefix.` in front of all keys, for the configuration that contains this one."""
        others = tuple(f"{prefix}.{other}" for other in self.related_fields)
        return replace(self, field=f"{prefix}.{self.field}", related_fields=others)

    def __str__(self) -> str:
        return f"{escape_unprintable(self.field, keep='')} = {self.value!r}: {escape_unprintable(self.hint)}"


@dataclass(frozen=True)
class UnreadableFields:
    """Configuration keys whose values could not be parsed and were replaced by defaults.

    Checks skip them: a problem found in a default is not one of the user's.
    """

    fields: frozenset[str] = field(default_factory=frozenset)
    """Dotted keys of unreadable values and groups; the empty key is the whole configuration."""
    readable_fields: frozenset[str] = field(default_factory=frozenset)
    """Keys inside an unreadable group whose values could be parsed."""

    def with_fields(self, fields: Iterable[str]) -> "UnreadableFields":
        """Return a copy that also contains `fields`."""
        return replace(self, fields=self.fields | frozenset(fields))

    def covers(self, key: str) -> bool:
        """Return whether the value of `key`, or a part of it, could not be parsed."""
        return any(_is_inside(unreadable, key) or self._hides(unreadable, key) for unreadable in self.fields)

    def _hides(self, unreadable: str, key: str) -> bool:
        readable = (known for known in self.readable_fields if known != unreadable and _is_inside(known, unreadable))
        return _is_inside(key, unreadable) and not any(_is_inside(key, known) for known in readable)


def _is_inside(key: str, group: str) -> bool:
    return group in ("", key) or key.startswith((f"{group}.", f"{group}["))


class ConfigError(Exception):
    """Invalid input. Raised before any process group or file of a run exists."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UnsupportedFormatConfigError(ConfigError):
    """A file of a run has a format that this version does not read; the file is not damaged."""


@contextmanager
def collect_problems(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of a `ConfigError` raised inside to `problems`, so that one message can list them all."""
    try:
        yield
    except ConfigError as refused:
        problems += refused.problems


def raise_if_any(problems: Iterable[Problem]) -> None:
    """Raise `ConfigError` with all of `problems` if there are any."""
    found = tuple(problems)
    if found:
        raise ConfigError(found)


class CollectiveError(RuntimeError):
    """A failed collective: a peer died, a link was silent beyond the timeout, or ranks called different operations."""


@contextmanager
def collective_error_context(rank: int, what: object, peers: Sequence[int], timeout: timedelta) -> Iterator[None]:
    """Turn a `RuntimeError` of the backend into `CollectiveError`, which names rank, operation, peers and timeout."""
    began = time.monotonic()
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        # The time tells a dead peer (immediately) from a silent one (after the timeout). Only the first line is kept:
        # a backend's message may continue with a C++ stack.
        seconds = time.monotonic() - began
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        others = ", ".join(str(peer) for peer in peers if peer != rank)
        message = f"rank {rank}: {what} with ranks {others} failed after {seconds:.1f} s"
        raise CollectiveError(f"{message} (limit {timeout.total_seconds():g} s): {reason}") from error
