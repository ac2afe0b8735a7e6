"""The one fault that logs end in, and messages of two ranks."""

from __future__ import annotations

from shoestring.launch.rehearsal.deadlock.stuck import hangs
from shoestring.launch.rehearsal.fault import Fault
from shoestring.launch.rehearsal.log import RankLog


def only(*logs: RankLog) -> Fault:
    (fault,) = hangs(logs)
    return fault
