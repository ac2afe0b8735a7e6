"""Rank 0's reports of a run: events go to telemetry, costs go to the ledger."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ..checkpoint.saver import SaveResult
from ..config import RunConfig
from ..costs.flops import FLOP_CONVENTION, count_flops
from ..costs.parameters import count_parameters
from ..ledger.budget_guard import BudgetGuard, CostMeter
from ..ledger.checkpoint_totals import carry_checkpoint_totals
from ..ledger.terms import PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS
from ..ledger.work_journal import WorkJournal
from ..structured_config import restore_interpolations
from ..telemetry.alerts import AlertMonitor
from ..telemetry.events import (
    JSON,
    BudgetReported,
    CheckpointSaved,
    Event,
    InitialWeightsLoaded,
    LossEvaluated,
    MemoryMeasured,
    RunResumed,
    RunStarted,
    RunStopped,
    StepLogged,
    TextSampled,
    TraceWritten,
    WarningRaised,
)
from ..telemetry.sinks import open_event_stream
from ..telemetry.stream import EventStream
from .evaluate import clear_evaluated_step, record_evaluated_step
from .exit import RankFailed
from .step import StepResult, StepSettings
from .step_metrics import step_metrics

if TYPE_CHECKING:
    from ...comm.traffic import TrafficCounter


RECORDS_WAIT = "they stay in memory until there is space"
"""Words of the warning that a disk does not take the run's records; `benchmarks/faults/` waits for them."""
STALL_THRESHOLD_SECONDS = 0.5
"""Longest time between two steps that is not charged to `stall`; the loop itself takes milliseconds."""
_ROUNDING_SECONDS = 0.005
"""Tolerance: the ledger counts whole milliseconds, and no bucket may be charged more than has passed."""


class UnaccountedTime:
    """Time that no bucket or step accounts for: a stopped process, a suspended machine, a frozen disk."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._accounted = 0.0

    def add_accounted(self, seconds: float) -> None:
        """Add `seconds` since the last `pop_unaccounted_seconds` that are charged elsewhere."""
        self._accounted += seconds

    def pop_unaccounted_seconds(self) -> float:
        """Return the seconds since the last call that nothing has accounted for."""
        now = time.perf_counter()
        gap = now - self._since - self._accounted - _ROUNDING_SECONDS
        self._since, self._accounted = now, 0.0
        return gap


@dataclass(frozen=True)
class _DirectoryIdentity:
    """A directory by device and inode, which differ if another one takes the same path later."""

    path: Path
    device: int
    inode: int

    @staticmethod
    def of(path: Path) -> "_DirectoryIdentity":
        status = path.stat()
        return _DirectoryIdentity(path, status.st_dev, status.st_ino)

    @property
    def is_gone(self) -> bool:
        """True if the path is missing or is another directory now; False if a file server does not answer."""
        try:
            return _DirectoryIdentity.of(self.path) != self
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False


class Reporter:
    """Writer of the run's event stream and of the work half of its ledger, on rank 0; see `NullReporter`.

    `report_run`, then `begin_training` come before the first step.
    """

    _flops_per_token: float
    _peak_tflops: float
    _budget: BudgetGuard

    def __init__(self, config: RunConfig, run_dir: Path, attempt: str) -> None:
        self._config = config
        self._run_dir = run_dir
        self._ranks = config.topology.world_size
        self._work = WorkJournal(run_dir, ranks=self._ranks, attempt=attempt, budget=config.budget)
        self._stream: EventStream = open_event_stream(config.telemetry, run_dir, sys.stdout)
        self._alerts = AlertMonitor()
        self._logging_seconds = 0.0
        self._is_logging = False
        self._unaccounted = UnaccountedTime()
        self._disk_is_full = False
        self._directory = _DirectoryIdentity.of(run_dir)
        # tokens_per_second is tokens over time since the last report, without the time charged to buckets.
        self._since = time.perf_counter()
        self._tokens_since = 0

    def report_run(self, peak_tflops: float, device: str, dtype: str, attention: str) -> None:
        """Report configuration, device and model size; `attention` names the attention kernel and the reason for it.

        MFU is the share of `peak_tflops`, the peak of one rank.
        """
        flops = count_flops(self._config.model, self._config.training.sequence_length)
        self._flops_per_token, self._peak_tflops = flops.main_and_mtp, peak_tflops
        parameters = count_parameters(self._config.model)
        is_peak_configured = bool(self._config.cluster.peak_tflops)
        self._stream.emit(
            RunStarted(
                step=0,
                version=__version__,
                config=restore_interpolations(asdict(self._config)),
                ranks=self._ranks,
                device=device,
                compute_dtype=dtype,
                linear=self._config.precision.linear,
                attention=attention,
                parameters=parameters.main + parameters.mtp,
                active_parameters=parameters.main_active + parameters.mtp_active,
                total_steps=self._config.total_steps,
                flops_per_token=flops.main_and_mtp,
                mfu_convention=f"{FLOP_CONVENTION}; MTP included",
                peak_tflops=peak_tflops,
                peak_source="cluster.peak_tflops" if is_peak_configured else "matrix product measured at the start",
            )
        )

    def report_resume(self, step: int, totals: Mapping[str, int | str]) -> None:
        """Report that the run resumes after `step` steps; `totals` are the ledger totals of the checkpoint."""
        carry_checkpoint_totals(self._work, self._run_dir, totals)
        self._work.record_resume(step)
        self._stream.emit(RunResumed(step=step))

    def report_first_start(self) -> None:
        """Report that the run begins with step 1: an evaluation that the directory records is of another run."""
        clear_evaluated_step(self._run_dir)

    def report_initial_weights(self, path: Path) -> None:
        """Report that the run begins with the weights of the checkpoint at `path`."""
        self._stream.emit(InitialWeightsLoaded(step=0, checkpoint=str(path)))

    def begin_training(self) -> None:
        """Start the clocks: the first step begins now."""
        # Ends the `initialization` bucket; the clocks below count from here.
        self._work.record_ready()
        meter = CostMeter(self._work.ledger.summarize(), ranks=self._ranks)
        self._budget = BudgetGuard(self._config.budget, meter, self._run_dir)
        self._logging_seconds = 0.0
        self._unaccounted = UnaccountedTime()
        self._since = time.perf_counter()

    @contextmanager
    def charge_time(self, bucket: str) -> Iterator[None]:
        """Charge the time inside to a bucket of the ledger."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._unaccounted.add_accounted(seconds)
            with self.logging_overhead():
                self._work.record_interval(bucket, 1000 * seconds)
            # Waiting for data is part of the training speed; evaluations and saves are not.
            if bucket != "data_stall":
                self._since += seconds

    @contextmanager
    def logging_overhead(self) -> Iterator[None]:
        """Charge the time inside to the `telemetry` bucket: writing metrics, ledger and terminal."""
        # Reports nest (report_step calls warn): only the outermost one counts the time.
        if self._is_logging:
            yield
            return
        self._is_logging, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._is_logging = False
            seconds = time.perf_counter() - start
            self._logging_seconds += seconds
            self._unaccounted.add_accounted(seconds)

    def _charge_logging(self) -> None:
        """Write the logging time since the last call to the ledger."""
        # One record per logged step, not one per report: the ledger stays small.
        seconds, self._logging_seconds = self._logging_seconds, 0.0
        with self.logging_overhead():
            self._work.record_interval("telemetry", 1000 * seconds)

    def _charge_stall(self, seconds: float) -> None:
        """Charge unaccounted time to `stall` if it is long enough."""
        if seconds >= STALL_THRESHOLD_SECONDS:
            self._work.record_interval("stall", 1000 * seconds)

    def report_step(
        self,
        step: int,
        result: StepResult,
        settings: StepSettings,
        seconds: float,
        traffic: "TrafficCounter",
        between_replicas: "TrafficCounter",
    ) -> None:
        """Report step number `step`: every step to the ledger, one in `log_every` to telemetry.

        `traffic` counts the bytes that rank 0 sent through the token exchange in this step, `between_replicas` those
        of gradients and weights. Raises `RankFailed` if the run directory is gone.
        """
        config, tokens = self._config, self._tokens_of(step)
        self._unaccounted.add_accounted(seconds)
        gap = self._unaccounted.pop_unaccounted_seconds()
        with self.logging_overhead():
            gpu_ms = self._work.record_step(step, 1000 * seconds, tokens)
            self._charge_stall(gap)
            self._check_disk(step)
            # The projection multiplies the tokens left by the price of a full batch; a token of the ramp's smaller
            # batches costs more.
            is_full = config.batch_ramp.batch_size(step) == config.training.global_batch_size
            self._budget.add_step(gpu_ms, tokens if is_full else None)
            self._tokens_since += tokens
            if step % config.telemetry.log_every == 0 or step in (1, config.total_steps):
                metrics = step_metrics(config, result, traffic, between_replicas)
                self._report_logged_step(step, result, settings, metrics)
                self._charge_logging()

    def _report_logged_step(
        self, step: int, result: StepResult, settings: StepSettings, metrics: Mapping[str, JSON]
    ) -> None:
        config = self._config
        now = time.perf_counter()
        rate = self._tokens_since / (now - self._since)
        self._since, self._tokens_since = now, 0
        account, *_ = self._budget.current_accounts(self._tokens_left(step))
        tflops = rate * self._flops_per_token / self._ranks / 1e12
        self._stream.emit(
            StepLogged(
                step=step,
                loss=result.loss,
                mtp_loss=result.mtp_loss if config.model.num_nextn_predict_layers else None,
                balance_loss=result.balance_loss,
                total_loss=result.total_loss,
                learning_rate=settings.learning_rate,
                mtp_loss_scaling_factor=settings.mtp_loss_scaling_factor,
                router_bias_update_rate=settings.router_bias_update_rate,
                grad_norm=result.grad_norm,
                metrics=metrics,
                tokens=config.tokens_after(step),
                tokens_per_second=rate,
                tflops=tflops,
                mfu=tflops / self._peak_tflops,
                gpu_hours=account.spent,
                budget_share=account.spent / account.limit,
                budget_left=account.limit - account.spent,
                projected_gpu_hours=account.projected,
                goodput=self._budget.meter.goodput(),
                eta_seconds=self._tokens_left(step) / rate,
                total_steps=config.total_steps,
            )
        )
        warnings = [*self._alerts.check_logged_step(result.loss, rate)]
        if (projected := self._budget.new_warning(self._tokens_left(step))) is not None:
            warnings.append(("budget", projected))
        for about, message in warnings:
            self._stream.emit(WarningRaised(step=step, about=about, message=message))

    def report_skipped_step(self, step: int, seconds: float) -> None:
        """Report that step number `step` took `seconds` and was dropped because loss or gradient was NaN/Inf."""
        with self.logging_overhead():
            self._work.record_skipped_step(step, 1000 * seconds, self._tokens_of(step))

    def report_step_time_terms(self, step: int, step_us: int, by_term: Mapping[str, int]) -> None:
        """Write the time of step number `step` by term to the ledger (see `WorkJournal.record_step_time_terms`)."""
        with self.logging_overhead():
            self._work.record_step_time_terms(step, step_us, by_term)

    def report_memory(self, measured: MemoryMeasured | None) -> None:
        """Report every rank's memory, unless it is unknown (see `telemetry.memory_usage`)."""
        if measured is not None:
            self._emit(measured)

    def report_evaluation(
        self, step: int, loss: float, averaged: float | None, targets: int, unigram_entropy: float
    ) -> None:
        """Report a validation loss in nats per token, over `targets` tokens.

        `averaged` is the loss of the moving average of the weights, if there is one; `unigram_entropy` is the loss of
        a model that knows only the frequency of each token. A resume does not repeat an evaluation reported here.
        """
        self._emit(
            LossEvaluated(
                step=step, loss=loss, targets=targets, unigram_entropy=unigram_entropy, averaged_loss=averaged
            )
        )
        record_evaluated_step(self._run_dir, step)

    def report_sample(self, step: int, prompt: str, continuation: str) -> None:
        """Report text that the model has generated."""
        self._emit(TextSampled(step=step, text=restore_interpolations(prompt) + continuation))

    def _check_disk(self, step: int) -> None:
        """Warn when records start or stop waiting for disk space; raise `RankFailed` if a file is gone."""
        # A removed file still takes writes: the run would train on, and its records and checkpoints would be lost.
        if self._directory.is_gone or self._work.is_file_removed:
            words = f"{self._run_dir} or its ledger was removed while the run was writing into it, by step {step}"
            raise RankFailed(f"{words}; the run ends, and what it has trained since its last checkpoint is lost")
        waiting = self._work.pending_records + self._stream.pending_events
        if waiting and not self._disk_is_full:
            reason = self._work.write_error or self._stream.write_error
            self._disk_is_full = True
            words = f"records of {self._run_dir} cannot be written ({reason})"
            self.warn(step, f"{words}; {RECORDS_WAIT}, and training continues", about="disk")
        elif not waiting and self._disk_is_full:
            self._disk_is_full = False
            self.warn(step, "there is disk space again: the waiting records were written", about="disk")

    def report_checkpoint(self, saved: SaveResult) -> None:
        """Report that a checkpoint is on disk, or could not be written."""
        if saved.warning is not None:
            self.warn(saved.step, saved.warning)
        if saved.failure is None:
            self._emit(CheckpointSaved(step=saved.step, path=str(saved.path)))
        else:
            self.warn(saved.step, f"the checkpoint of step {saved.step} could not be written: {saved.failure}")

    def warn(self, step: int, text: str, about: str = "checkpoint") -> None:
        """Report a problem that does not end the run, as an event and on standard error."""
        with self.logging_overhead():
            self._stream.emit(WarningRaised(step=step, about=about, message=text))
            _print_error(text)

    def report_trace(self, step: int, path: Path, metrics: Mapping[str, JSON]) -> None:
        """Report that a timeline was written; `metrics` are the seconds of each term, by rank."""
        self._emit(TraceWritten(step=step, path=str(path), metrics=metrics))

    def budget_halt_reason(self, done: int) -> str | None:
        """Return why the budget requires a halt after `done` steps; None if it does not."""
        # Called inside a step, whose whole time is charged: charging this to `telemetry` would count it twice.
        return self._budget.halt_reason(self._tokens_left(done))

    def ledger_totals(self) -> dict[str, int | str]:
        """Return the ledger totals that a checkpoint carries."""
        with self.logging_overhead():
            # On disk first: a checkpoint must not know of records that a crash could still lose.
            self._work.sync()
            return self._work.ledger.summarize().checkpoint_totals()

    def close(self, step: int, reason: str, *, clean: bool = True) -> None:
        """Report the end of the run after `step` steps; `clean` is False if a fault has ended it."""
        # After a fault, the time since the last record belongs to how the attempt ended, not to `stall`.
        if clean:
            self._charge_stall(self._unaccounted.pop_unaccounted_seconds())
            self._charge_logging()
        self._work.close(clean=clean)
        summary = self._work.ledger.summarize()
        self._stream.emit(
            BudgetReported(
                step=step,
                metrics=dict(_flatten(summary.to_json())),
                gpu_hours=summary.gpu_hours,
                gpu_hours_per_trillion_tokens=summary.gpu_hours_per_trillion_tokens,
                published_gpu_hours_per_trillion_tokens=PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
                budget_share=summary.budget_share,
            )
        )
        self._stream.emit(RunStopped(step=step, reason=reason))
        self._stream.close()
        if lost := self._stream.pending_events + self._work.pending_records:
            why = self._stream.write_error or self._work.write_error
            _print_error(f"{lost} records of the run could not be written: {why}")

    def _tokens_left(self, done: int) -> int:
        return self._config.tokens_after(self._config.total_steps) - self._config.tokens_after(done)

    def _tokens_of(self, step: int) -> int:
        return self._config.tokens_after(step) - self._config.tokens_after(step - 1)

    def _emit(self, event: Event) -> None:
        """Emit `event`, and charge the time to `telemetry`."""
        with self.logging_overhead():
            self._stream.emit(event)


def _print_error(text: str) -> None:
    with suppress(OSError):  # standard error may be a full disk or a closed pipe
        print(f"shoestring train: {text}", file=sys.stderr, flush=True)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
