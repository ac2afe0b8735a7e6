"""The one way any part of Shoestring says no to bad input: all problems at once, each with field, value and remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input.

    `field` is the dotted configuration key, or the path of a file; `remedy` says what is wrong and what to write
    instead.
    """

    field: str
    value: object
    remedy: str

    def under(self, prefix: str) -> Problem:
        """The same problem seen from the configuration that holds this one under the key `prefix`."""
        return replace(self, field=f"{prefix}.{self.field}")

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.remedy}"


class Refused(Exception):  # noqa: N818 -- reads as the sentence it is: the input was refused
    """Input that cannot be honoured. Raised before any process group or file of a run exists."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def refuse_if_any(problems: Iterable[Problem]) -> None:
    """Raise `Refused` with all of `problems`, or return when there are none."""
    found = tuple(problems)
    if found:
        raise Refused(found)
