"""The memory that a rank needs as predicted, against every allocation of real ranks."""

from __future__ import annotations

import pytest

from shoestring.launch.compose import compose_run
from shoestring.tests.trainer.memory.measured_runs import BASE, CPU, ONE_RANK, run
from shoestring.trainer.memory.forecast import RunMemory


@pytest.mark.slow
def test_without_blocks_the_overloaded_rank_needs_more() -> None:
    blocks, whole = (run(f"{ONE_RANK} recompute.expert_rows={rows}", skewed=True) for rows in (128, 2**20))
    fewer, more = blocks[1][0], whole[1][0]
    saved = whole[0].of(0, whole[0].most_rows).total - blocks[0].of(0, blocks[0].most_rows).total
    assert more.between - fewer.between > 0.2 * more.between
    assert more.total - fewer.total == pytest.approx(saved, rel=0.2)


def test_the_bound_covers_even_routing_and_falls_with_the_block() -> None:
    def bound(rows: int) -> float:
        described = f"{BASE} {ONE_RANK} recompute.expert_rows={rows}"
        memory = RunMemory(compose_run(described.split()), CPU)
        assert memory.bound(0) > memory.of(0).total
        return memory.bound(0)

    assert bound(128) < bound(1024) < bound(2**20)
