"""How a run ends before its end: because it cannot go on, or on purpose, all ranks after the same step."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch

from ...comm.groups import Group


class HaltReason(IntEnum):
    """Why a run halts. The number is the exit code of `shoestring train`."""

    OVER_BUDGET = 3
    """The GPU-hours of the budget are used up."""
    PREEMPTED = 75
    """It was asked to; 75 is EX_TEMPFAIL of sysexits.h: please try again."""


class RunFailed(RuntimeError):  # noqa: N818 -- says what happened
    """The run cannot go on; the message says why and what to do. Raised on every rank."""


class RankFailed(RuntimeError):  # noqa: N818 -- says what happened
    """One rank cannot go on; the message says why. Raised on that rank alone: the others miss it in a collective."""


class RunHalted(RuntimeError):  # noqa: N818 -- says what happened
    """The run has halted, its last step in a checkpoint. Raised on every rank; the first one's message says why."""

    def __init__(self, halt: HaltReason, message: str, *, made_progress: bool) -> None:
        """`progressed` says whether this attempt has made a step."""
        super().__init__(message)
        self.reason = halt
        self.made_progress = made_progress


def never_stop() -> bool:
    """Return False: no stop was asked for."""
    return False


def decide_halt_reason(asked: int, over_budget: int) -> HaltReason | None:
    """Return why the run halts, given on how many ranks it was asked to stop, and is over its budget."""
    if over_budget:  # a run that is started again would meet it first
        return HaltReason.OVER_BUDGET
    return HaltReason.PREEMPTED if asked else None


def all_reduce_halt_reason(group: Group, *, stop_requested: bool, over_budget: bool) -> HaltReason | None:
    """Collective, before the first step: whether any rank has a reason. `group` is one for tensors on the host."""
    flags = torch.tensor([stop_requested, over_budget], dtype=torch.int64)
    return decide_halt_reason(*group.all_reduce_sum(flags, "whether to halt").tolist())


def any_rank_requested_stop(group: Group, stop_asked: Callable[[], bool]) -> bool:
    """Collective: whether any rank was asked to stop. `group` is one for tensors on the host."""
    flag = torch.tensor([stop_asked()], dtype=torch.int64)
    return bool(group.all_reduce_sum(flag, "whether to stop"))
