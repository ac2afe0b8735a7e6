"""Ways in which a run ends early: an error, or a halt that all ranks agree on after the same step."""

from collections.abc import Callable
from enum import IntEnum

import torch

from ...comm.groups import Group


class HaltReason(IntEnum):
    """Reason of a halt. The value is the exit code of `shoestring train`."""

    OVER_BUDGET = 3
    """The GPU-hours of the budget are used up."""
    PREEMPTED = 75
    """A stop was requested; 75 is EX_TEMPFAIL of sysexits.h: the same command may be run again."""


class RunFailed(RuntimeError):  # noqa: N818 -- says what happened
    """Error that ends the run; the message gives the reason and a hint. Raised on every rank."""


class RankFailed(RuntimeError):  # noqa: N818 -- says what happened
    """Error of one rank, raised there alone: the others then fail in a collective that misses this rank."""


class RunHalted(RuntimeError):  # noqa: N818 -- says what happened
    """Halt of a run whose last step is in a checkpoint. Raised on every rank; rank 0's message gives the reason."""

    def __init__(self, halt: HaltReason, message: str, *, made_progress: bool) -> None:
        """Set `made_progress` if this attempt has completed a step."""
        super().__init__(message)
        self.reason = halt
        self.made_progress = made_progress


def never_stop() -> bool:
    """Return False: no stop is requested."""
    return False


def decide_halt_reason(asked: int, over_budget: int) -> HaltReason | None:
    """Return why the run halts; `asked` and `over_budget` are the numbers of ranks that report each reason."""
    # The budget comes first: PREEMPTED invites a restart, and the restarted run would halt for its budget.
    if over_budget:
        return HaltReason.OVER_BUDGET
    return HaltReason.PREEMPTED if asked else None


def all_reduce_halt_reason(group: Group, *, stop_requested: bool, over_budget: bool) -> HaltReason | None:
    """Return the reason to halt before the first step, if any rank has one. Collective; `group` is a CPU group."""
    flags = torch.tensor([stop_requested, over_budget], dtype=torch.int64)
    return decide_halt_reason(*group.all_reduce_sum(flags, "whether to halt").tolist())


def any_rank_requested_stop(group: Group, stop_asked: Callable[[], bool]) -> bool:
    """Return whether a stop was requested on any rank. Collective; `group` is a CPU group."""
    # All ranks must leave at the same point: a rank that stops alone leaves its peers in a collective.
    flag = torch.tensor([stop_asked()], dtype=torch.int64)
    return bool(group.all_reduce_sum(flag, "whether to stop"))
