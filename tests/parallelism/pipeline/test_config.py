"""Configuration of the pipeline schedule: its values alone."""

from shoestring.parallelism.pipeline.config import ScheduleConfig
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES


def test_every_schedule_can_be_configured_and_other_values_are_refused() -> None:
    for schedule in SCHEDULES:
        assert not list(ScheduleConfig(name=schedule.name).problems())
    wrong = ScheduleConfig(name="dualpip", micro_batch_size=2**20 + 1, chunks=4097)
    assert {problem.field: problem.hint for problem in wrong.problems()} == {
        "name": "must be gpipe, 1f1b, interleaved, zb_h1, dualpipe or dualpipev",
        "micro_batch_size": "must be at most 1,048,576",
        "chunks": "must be at most 4,096, or null",
    }
