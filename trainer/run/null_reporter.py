"""The reporter of the ranks that report nothing, so that no caller asks whether there is one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import override

from ...comm.traffic import TrafficCounter
from ..checkpoint.saver import SaveResult
from ..telemetry.events import JSON, MemoryMeasured
from .reporter import Reporter
from .step import StepResult, StepSettings


class NullReporter(Reporter):
    """Reporter of a rank other than 0: it reports nothing."""

    def __init__(self) -> None:
        """Open no file."""

    @override
    def report_run(self, peak_tflops: float, device: str, dtype: str, attention: str) -> None:
        pass

    @override
    def report_first_start(self) -> None:
        pass

    @override
    def report_resume(self, step: int, totals: Mapping[str, int | str]) -> None:
        pass

    @override
    def report_initial_weights(self, path: Path) -> None:
        pass

    @override
    def begin_training(self) -> None:
        pass

    @override
    @contextmanager
    def charge_time(self, bucket: str) -> Iterator[None]:
        yield

    @override
    @contextmanager
    def logging_overhead(self) -> Iterator[None]:
        yield

    @override
    def report_step(
        self,
        step: int,
        result: StepResult,
        settings: StepSettings,
        seconds: float,
        traffic: TrafficCounter,
        between_replicas: TrafficCounter,
    ) -> None:
        pass

    @override
    def report_skipped_step(self, step: int, seconds: float) -> None:
        pass

    @override
    def report_step_time_terms(self, step: int, step_us: int, by_term: Mapping[str, int]) -> None:
        pass

    @override
    def report_memory(self, measured: MemoryMeasured | None) -> None:
        pass

    @override
    def report_evaluation(
        self, step: int, loss: float, averaged: float | None, targets: int, unigram_entropy: float
    ) -> None:
        pass

    @override
    def report_sample(self, step: int, prompt: str, continuation: str) -> None:
        pass

    @override
    def report_checkpoint(self, saved: SaveResult) -> None:
        pass

    @override
    def warn(self, step: int, text: str, about: str = "checkpoint") -> None:
        pass

    @override
    def report_trace(self, step: int, path: Path, metrics: Mapping[str, JSON]) -> None:
        pass

    @override
    def budget_halt_reason(self, done: int) -> str | None:
        return None

    @override
    def ledger_totals(self) -> dict[str, int | str]:
        return {}

    @override
    def close(self, step: int, reason: str, *, clean: bool = True) -> None:
        pass
