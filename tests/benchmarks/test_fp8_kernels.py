"""The benchmark of FP8 kernels on a machine without a GPU: it runs, and reports that there is nothing to measure."""

import sys
from dataclasses import replace

import pytest
import torch

from shoestring.benchmarks import fp8_kernels, v3_layer


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_they_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    for benchmark in (fp8_kernels, v3_layer):
        benchmark.main()
        assert "nothing to measure here" in capsys.readouterr().out


def test_what_is_asked_of_our_kernels_is_the_traces_rate_on_all_processors() -> None:
    shapes = {shape.name: shape for shape in fp8_kernels.SHAPES}
    assert shapes["o_proj fwd"].asked(132) == pytest.approx(1068 * 132 / 112)
    assert shapes["o_proj dgrad"].asked(132) == pytest.approx(1038 * 132 / 112)
    assert shapes["o_proj wgrad"].asked(132) == pytest.approx(0.9 * 642 * 132 / 112)
    row = fp8_kernels.Row("o_proj fwd", trace=1068, triton=1258.0, torch=2000.0, bf16=700.0, error=1e-3, asked=1258.7)
    assert fp8_kernels.outcomes(row) == ["BELOW"]  # ours alone count
    assert fp8_kernels.outcomes(replace(row, triton=1259.0)) == ["reached"]
    assert fp8_kernels.outcomes(replace(row, triton=1259.0, error=0.02)) == ["reached", "WRONG"]
    assert fp8_kernels.outcomes(replace(row, triton=None, error=float("nan"))) == ["WRONG"]


class Event:
    """An event of a GPU that starts work when the host waits for it, or immediately if `awake`; 1 ms per event."""

    clock, awake = 0.0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        Event.clock += 1
        self.at = Event.clock

    def query(self) -> bool:
        return Event.awake > 0

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.mark.parametrize("late", [0, 2])
def test_the_gpu_sleeps_until_all_repetitions_are_queued(monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    slept: list[int] = []

    def sleep(cycles: int) -> None:
        slept.append(cycles)
        Event.awake = late + 1 - len(slept)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty(8))
    times = fp8_kernels.milliseconds(lambda: torch.zeros(1))
    assert times == [1.0] * fp8_kernels.REPETITIONS
    assert slept == [2**26 * 2**doubled for doubled in range(late + 1)]
