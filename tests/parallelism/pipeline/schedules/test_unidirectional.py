"""Unidirectional schedules, instruction by instruction."""

from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.tests.parallelism.pipeline.schedules.written import written


def test_one_way_schedules_in_full() -> None:
    assert written(build_program("gpipe", 2, 2), 0) == "F0 F1 B0 B1"
    assert [written(build_program("1f1b", 3, 4), rank) for rank in range(3)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert [written(build_program("zb_h1", 2, 3), rank) for rank in range(2)] == [
        "F0 F1 I0 W0 F2 I1 W1 I2 W2",
        "F0 I0 F1 I1 W0 F2 I2 W1 W2",
    ]
    assert written(build_program("interleaved", 2, 2), 1) == "F0 F1 f0 b0 f1 b1 B0 B1"
