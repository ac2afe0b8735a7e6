"""The program of a step: another one where the batch has grown, as it has more micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...parallelism.pipeline.executor import Executor
from ...parallelism.pipeline.liveness import first_use, last_use
from ...parallelism.zero.optimizer import ShardedOptimizer


class ScheduleCache:
    """What runs the steps of one rank, and keeps the optimizer informed of what runs."""

    def __init__(
        self,
        build: Callable[[int], Executor],
        executor: Executor,
        optimizer: ShardedOptimizer,
        users: Iterable[tuple[int, ...]],
    ) -> None:
        """`build` makes what runs so many micro-batches; `executor` is what `optimizer` follows now.

        `users`: of each bucket of the optimizer, the stages that compute with it.
        """
        self.executor = executor
        self._build = build
        self._optimizer = optimizer
        self._users = tuple(users)

    def of(self, micro_batches: int) -> Executor:
        """What runs a step of so many micro-batches. The same number as in the step before costs nothing."""
        if micro_batches != self.executor.program.micro_batches:
            self.executor = self._build(micro_batches)
            program, rank = self.executor.program, self.executor.rank
            self._optimizer.follow(
                needed_from=[first_use(program, rank, users) for users in self._users],
                final_after=[last_use(program, rank, users) for users in self._users],
            )
        return self.executor
