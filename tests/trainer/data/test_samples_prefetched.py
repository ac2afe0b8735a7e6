"""The next step's samples are read during the step; errors arrive with their step."""

import threading

import pytest

from shoestring.trainer.data.samples import StepPrefetcher


def test_the_next_step_is_read_before_it_is_asked_for() -> None:
    begun = {step: threading.Event() for step in range(1, 5)}

    def read(step: int) -> int:
        begun[step].set()
        return 10 * step

    reader = StepPrefetcher(read, 3)
    for step in (1, 2, 3):
        assert reader.take(step) == 10 * step
        if step < 3:
            assert begun[step + 1].wait(10)
    reader.close()
    assert not begun[4].is_set()


def test_a_step_out_of_order_is_read_when_it_is_asked_for() -> None:
    reader = StepPrefetcher(lambda step: step, 100)
    assert [reader.take(step) for step in (5, 6, 20, 3)] == [5, 6, 20, 3]
    reader.close()


def test_an_error_is_raised_at_its_step() -> None:
    def read(step: int) -> int:
        if step == 2:
            raise OSError("gone")
        return step

    reader = StepPrefetcher(read, 5)
    assert reader.take(1) == 1
    with pytest.raises(OSError, match="gone"):
        reader.take(2)
    assert reader.take(3) == 3
    reader.close()
