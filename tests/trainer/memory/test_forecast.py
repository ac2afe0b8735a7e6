"""The predicted memory of a rank, against every allocation of real ranks."""

import pytest

from shoestring.launch.compose import compose_run_config
from shoestring.tests.trainer.memory.measured_runs import BASE, CPU, ONE_RANK, run
from shoestring.trainer.memory.forecast import MemoryPredictor


@pytest.mark.slow
def test_without_blocks_the_overloaded_rank_needs_more() -> None:
    blocks, whole = (run(f"{ONE_RANK} recompute.expert_block_rows={rows}", skewed=True) for rows in (128, 2**20))
    fewer, more = blocks[1][0], whole[1][0]
    saved = (
        whole[0].predict_rank(0, whole[0].worst_case_expert_rows).total
        - blocks[0].predict_rank(0, blocks[0].worst_case_expert_rows).total
    )
    assert more.between_instructions - fewer.between_instructions > 0.2 * more.between_instructions
    assert more.total - fewer.total == pytest.approx(saved, rel=0.2)


def test_the_bound_covers_even_routing_and_falls_with_the_block() -> None:
    def bound(rows: int) -> float:
        described = f"{BASE} {ONE_RANK} recompute.expert_block_rows={rows}"
        memory = MemoryPredictor(compose_run_config(described.split()), CPU)
        assert memory.upper_bound_bytes(0) > memory.predict_rank(0).total
        return memory.upper_bound_bytes(0)

    assert bound(128) < bound(1024) < bound(2**20)
