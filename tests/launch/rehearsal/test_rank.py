"""A rank of a tiny model on a device that computes nothing: a process writes each log, as in `rehearse`."""

from shoestring.launch.rehearsal.log import RankLog
from shoestring.tests.launch.rehearsal.rehearsed_rank import (
    FP8_RANK,
    MICRO_BATCHES,
    config_of,
)


def test_a_whole_step_runs_without_a_finding(log: RankLog) -> None:
    assert log.findings == ()
    assert log.micro_batches == MICRO_BATCHES if log.rank == FP8_RANK else config_of(log).num_micro_batches
    assert {row.phase for row in log.launches} >= {"attn(F)", "mlp(B)", "dispatch", "combine_backward", "optimizer"}
    assert log.operations > sum(row.launches for row in log.launches) > 1000
    assert any("balanced" in each for each in log.assumptions)
