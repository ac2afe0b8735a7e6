"""The two ways to fail with a clear message: bad input, and a collective that did not come to its end.

Bad input is reported with all problems at once, each with field, value and remedy. A failed collective names who
waited, in what operation and for whom.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta


def escape_unprintable(text: str, keep: str = "\n\t") -> str:
    """`text` with every character that is not printable as its escape, but for those in `keep`.

    Names of files, tensors and keys come from others: an ESC among them would command the terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input.

    `field` is the dotted configuration key, or the path of a file; `hint` says what is wrong and what to write
    instead. `others` are the keys that the value was judged by, where it is not impossible on its own.
    """

    field: str
    value: object
    hint: str
    related_fields: tuple[str, ...] = ()

    def with_prefix(self, prefix: str) -> Problem:
        """The same problem seen from the configuration that holds this one under the key `prefix`."""
        others = tuple(f"{prefix}.{other}" for other in self.related_fields)
        return replace(self, field=f"{prefix}.{self.field}", related_fields=others)

    def __str__(self) -> str:
        return f"{escape_unprintable(self.field, keep='')} = {self.value!r}: {escape_unprintable(self.hint)}"


@dataclass(frozen=True)
class UnreadableFields:
    """Where a configuration holds defaults because what was written could not be read: they prove nothing.

    Judging by them would name problems that the writer does not have.
    """

    fields: frozenset[str] = field(default_factory=frozenset)
    """Dotted keys of values and of whole groups; the empty key is the whole configuration."""
    readable_fields: frozenset[str] = field(default_factory=frozenset)
    """Keys that were written readably. Inside a doubtful group these are as they were meant."""

    def with_fields(self, fields: Iterable[str]) -> UnreadableFields:
        """This doubt and that about `fields`."""
        return replace(self, fields=self.fields | frozenset(fields))

    def covers(self, key: str) -> bool:
        """Whether the value of `key`, or a part of it, is in doubt."""
        return any(_inside(doubtful, key) or self._spreads(doubtful, key) for doubtful in self.fields)

    def _spreads(self, doubtful: str, key: str) -> bool:
        sure = (known for known in self.readable_fields if known != doubtful and _inside(known, doubtful))
        return _inside(key, doubtful) and not any(_inside(key, known) for known in sure)


def _inside(key: str, group: str) -> bool:
    return group in ("", key) or key.startswith((f"{group}.", f"{group}["))


class ConfigError(Exception):
    """Input that cannot be honored. Raised before any process group or file of a run exists."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


@contextmanager
def collect_problems(problems: list[Problem]) -> Iterator[None]:
    """Add what is refused inside to `problems`, so that all that is wrong is told at once."""
    try:
        yield
    except ConfigError as refused:
        problems += refused.problems


def raise_if_any(problems: Iterable[Problem]) -> None:
    """Raise `ConfigError` with all of `problems`, or return when there are none."""
    found = tuple(problems)
    if found:
        raise ConfigError(found)


class CollectiveError(RuntimeError):
    """A peer died, a link went silent for longer than the limit, or the ranks disagree on what they are doing."""


@contextmanager
def collective_error_context(rank: int, what: object, peers: Sequence[int], timeout: timedelta) -> Iterator[None]:
    """Turn what the backend raises into `CollectiveError`, which names rank, operation, peers and limit."""
    began = time.monotonic()
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        seconds = time.monotonic() - began
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        others = ", ".join(str(peer) for peer in peers if peer != rank)
        message = f"rank {rank}: {what} with ranks {others} failed after {seconds:.1f} s"
        raise CollectiveError(f"{message} (limit {timeout.total_seconds():g} s): {reason}") from error
