"""A debugging aid: every rank of a group issues the same exchanges in the same order, or all of them say who does not.

Without it, two ranks that disagree wait for each other until the limit, and the error names what each waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .failure import CollectiveFailed
from .groups import Group


@dataclass
class OrderCheck:
    """Compares exchanges over a group before they run; costs one small collective each."""

    group: Group
    issued: list[str] = field(default_factory=list)
    """What this rank has issued so far."""

    def check(self, what: str) -> None:
        """Raise `CollectiveFailed` on every rank unless all are about to run `what`."""
        self.issued.append(what)
        number = len(self.issued)
        calls = self.group.all_gather_objects((number, what), f"order check before {what}")
        if len(set(calls)) > 1:
            each = "; ".join(
                f"rank {rank} runs number {n}, {text}" for rank, (n, text) in zip(self.group.ranks, calls, strict=True)
            )
            raise CollectiveFailed(f"rank {self.group.rank}: the ranks disagree on the order of exchanges: {each}")
