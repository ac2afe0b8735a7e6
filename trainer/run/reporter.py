"""Rank 0's account of a run: what happened goes to telemetry, what it cost goes to the ledger."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...comm.traffic import TrafficKind
from ...parallelism.zero.reduce import ALL_GATHER, REDUCE_SCATTER
from ..checkpoint.saver import SaveResult
from ..config import RunConfig
from ..costs.flops import FLOP_CONVENTION, FlopCount
from ..costs.parameters import count_parameters
from ..ledger.budget_guard import BudgetGuard
from ..ledger.checkpoint_totals import carry_checkpoint_totals
from ..ledger.meter import CostMeter
from ..ledger.work_journal import WorkJournal
from ..structured_config import restore_interpolations
from ..telemetry.alerts import AlertMonitor
from ..telemetry.events import JSON, Event, EventStream
from ..telemetry.sinks import open_event_stream
from .exit import RankFailed
from .step import StepResult, StepSettings

if TYPE_CHECKING:
    from ...comm.topology import Topology
    from ...comm.traffic import TrafficCounter


@dataclass(frozen=True)
class MfuInputs:
    """What the figures of a step are computed from."""

    flops: FlopCount
    peak_tflops: float


STALL_THRESHOLD_SECONDS = 0.5
"""Less time than this between two steps, charged to nothing, is `unknown`: the loop itself takes milliseconds."""
_ROUNDING_SECONDS = 0.005
"""Left uncharged, since the ledger counts in whole milliseconds: no bucket may be charged more than has passed."""


class UnaccountedTime:
    """Time that nothing accounts for: a process that was stopped, a machine that was suspended, a frozen disk."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._accounted = 0.0

    def add_accounted(self, seconds: float) -> None:
        """`seconds` of the time since the last `close` are charged to something, or will be."""
        self._accounted += seconds

    def pop_unaccounted_seconds(self) -> float:
        """Return the seconds since the last call that nothing has accounted for."""
        now = time.perf_counter()
        gap = now - self._since - self._accounted - _ROUNDING_SECONDS
        self._since, self._accounted = now, 0.0
        return gap


@dataclass(frozen=True)
class _Place:
    """A directory, told from another one that has its name later."""

    path: Path
    device: int
    inode: int

    @staticmethod
    def of(path: Path) -> _Place:
        status = path.stat()
        return _Place(path, status.st_dev, status.st_ino)

    @property
    def is_gone(self) -> bool:
        """Whether its name leads nowhere, or to another one; a file server that does not answer says neither."""
        try:
            return _Place.of(self.path) != self
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False


class Reporter:
    """Opens the run's event stream and its half of the ledger; every rank but the first has none."""

    def __init__(self, config: RunConfig, run_dir: Path, attempt: str) -> None:
        self._config = config
        self._run_dir = run_dir
        self._ranks = config.topology.world_size
        self._work = WorkJournal(run_dir, ranks=self._ranks, attempt=attempt, budget=config.budget)
        self._stream: EventStream = open_event_stream(config.telemetry, run_dir, sys.stdout)
        self._ledger = self._work.ledger
        self._meter: CostMeter | None = None
        self._guard: BudgetGuard | None = None
        self._watch = AlertMonitor()
        self._told_seconds = 0.0
        self._is_telling = False
        self._gaps = UnaccountedTime()
        self._disk_is_full = False
        self._place = _Place.of(run_dir)
        self._since = time.perf_counter()
        self._tokens_since = 0

    def report_run(self, speed: MfuInputs, device: str, dtype: str, attention: str) -> None:
        """What is about to run; `attention` says by which kernel and why."""
        self._speed = speed
        parameters = count_parameters(self._config.model)
        peak_source = (
            "cluster.peak_tflops" if self._config.cluster.peak_tflops else "matrix product measured at the start"
        )
        values: dict[str, Any] = {
            "config": restore_interpolations(asdict(self._config)),
            "ranks": self._ranks,
            "device": device,
            "compute_dtype": dtype,
            "linear": self._config.precision.linear,
            "attention": attention,
            "parameters": parameters.main + parameters.mtp,
            "active_parameters": parameters.main_active + parameters.mtp_active,
            "total_steps": self._config.total_steps,
            "flops_per_token": speed.flops.main_and_mtp,
            "mfu_convention": f"{FLOP_CONVENTION}; MTP included",
            "peak_tflops": speed.peak_tflops,
            "peak_source": peak_source,
        }
        self._emit("run", 0, values)

    def report_resume(self, step: int, totals: Mapping[str, int | str]) -> None:
        """The run goes on after `step` steps."""
        carry_checkpoint_totals(self._work, self._run_dir, totals)
        self._work.record_resume(step)
        self._emit("resume", step, {})

    def report_initial_weights(self, path: Path) -> None:
        """The run begins with the weights of the checkpoint at `path`."""
        self._emit("start", 0, {"checkpoint": str(path)})

    def begin_training(self) -> None:
        """The first step begins now."""
        self._work.record_ready()
        self._meter = CostMeter(self._ledger.summarize(), ranks=self._ranks)
        self._guard = BudgetGuard(self._config.budget, self._meter, self._run_dir)
        self._told_seconds = 0.0
        self._gaps = UnaccountedTime()
        self._since = time.perf_counter()

    @contextmanager
    def charge_time(self, bucket: str) -> Iterator[None]:
        """Charge what runs inside to a bucket of the ledger. Of these, tokens per second count waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._gaps.add_accounted(seconds)
            with self.logging_overhead():
                self._work.record_interval(bucket, 1000 * seconds)
            if bucket != "data_stall":
                self._since += seconds

    @contextmanager
    def logging_overhead(self) -> Iterator[None]:
        """What runs inside is neither training nor waiting, but telling: it is charged to `telemetry`."""
        if self._is_telling:
            yield
            return
        self._is_telling, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._is_telling = False
            seconds = time.perf_counter() - start
            self._told_seconds += seconds
            self._gaps.add_accounted(seconds)

    def _charge_telling(self) -> None:
        """Enter into the ledger what telling has taken so far."""
        seconds, self._told_seconds = self._told_seconds, 0.0
        with self.logging_overhead():
            self._work.record_interval("telemetry", 1000 * seconds)

    def _charge_stall(self, seconds: float) -> None:
        """Enter into the ledger time that nothing accounts for, if it is long."""
        if seconds >= STALL_THRESHOLD_SECONDS:
            self._work.record_interval("stall", 1000 * seconds)

    def report_step(
        self,
        step: int,
        result: StepResult,
        settings: StepSettings,
        seconds: float,
        traffic: TrafficCounter,
        between_replicas: TrafficCounter,
    ) -> None:
        """Step number `step` is done. Every step goes to the ledger, one in `log_every` to telemetry.

        `traffic` holds the bytes that rank 0 has sent to experts in this step, the other those between replicas.
        Raises `RankFailed` where the run directory is gone.
        """
        config, tokens = self._config, self._tokens_of(step)
        assert self._guard is not None and self._meter is not None  # noqa: PT018
        self._gaps.add_accounted(seconds)
        gap = self._gaps.pop_unaccounted_seconds()
        with self.logging_overhead():
            gpu_ms = self._work.record_step(step, 1000 * seconds, tokens)
            self._charge_stall(gap)
            self._look_at_disk(step)
            if (
                config.batch_ramp.batch_size(step) == config.training.global_batch_size
            ):  # tokens of smaller steps are dearer
                self._guard.observe_step(gpu_ms, tokens)
            self._meter.add_step(gpu_ms)
            self._tokens_since += tokens
            if step % config.telemetry.log_every == 0 or step in (1, config.total_steps):
                self._tell(step, result, settings, traffic, between_replicas)
                self._charge_telling()

    def _tell(
        self,
        step: int,
        result: StepResult,
        settings: StepSettings,
        traffic: TrafficCounter,
        between_replicas: TrafficCounter,
    ) -> None:
        config = self._config
        now = time.perf_counter()
        rate = self._tokens_since / (now - self._since)
        self._since, self._tokens_since = now, 0
        assert self._meter is not None and self._guard is not None  # noqa: PT018
        own, *_ = self._guard.current_accounts(self._tokens_left(step))
        tflops = rate * self._speed.flops.main_and_mtp / self._ranks / 1e12
        values: dict[str, JSON] = {
            "loss": result.loss,
            "loss/mtp": result.mtp_loss if config.model.num_nextn_predict_layers else None,
            "loss/seq_aux": result.balance_loss,
            "loss/total": result.total_loss,
            "learning_rate": settings.learning_rate,
            "mtp_loss_scaling_factor": settings.mtp_loss_scaling_factor,
            "router_bias_update_rate": settings.router_bias_update_rate,
            "grad_norm": result.grad_norm,
            "tokens": config.tokens_after(step),
            "tokens_per_second": rate,
            "tflops": tflops,
            "mfu": tflops / self._speed.peak_tflops,
            "gpu_hours": own.spent,
            "budget_share": own.spent / own.limit,
            "budget_left": own.limit - own.spent,
            "projected_gpu_hours": own.projected,
            "goodput": self._meter.goodput(),
            "eta_seconds": self._tokens_left(step) / rate,
            "total_steps": config.total_steps,
            **(
                exchange_traffic_metrics(traffic) if config.exchange.name != "deepep" else {}
            ),  # which does not say what it sends
            **replica_traffic_metrics(between_replicas),
            **load_balance_metrics(result, config.topology),
            **routing_metrics(result),
        }
        self._emit("step", step, values)
        warning = self._guard.new_warning(self._tokens_left(step))
        troubles = [
            *self._watch.check_logged_step(result.loss, rate),
            *([] if warning is None else [("budget", warning)]),
        ]
        for about, message in troubles:
            self._emit("warning", step, {"about": about, "message": message})

    def report_skipped_step(self, step: int, seconds: float) -> None:
        """Step number `step` has taken so long for nothing: it was not finite."""
        with self.logging_overhead():
            self._work.record_skipped_step(step, 1000 * seconds, self._tokens_of(step))

    def report_step_time_terms(self, step: int, step_us: int, by_term: Mapping[str, int]) -> None:
        """Where the time of step number `step` has gone on all ranks (see `WorkJournal.record_step_time_terms`)."""
        with self.logging_overhead():
            self._work.record_step_time_terms(step, step_us, by_term)

    def report_memory(self, step: int, values: Mapping[str, JSON]) -> None:
        """What every rank uses after step number `step` (see `memory_values`); nothing where nobody says."""
        if values:
            with self.logging_overhead():
                self._emit("memory", step, values)

    def report_evaluation(
        self, step: int, loss: float, averaged: float | None, targets: int, unigram_entropy: float
    ) -> None:
        """A validation loss, beside the entropy that knowing the frequency of each token alone would reach.

        `averaged` is the loss of the moving average of the weights, where there is one.
        """
        values: dict[str, JSON] = {"loss": loss, "targets": targets, "unigram_entropy": unigram_entropy}
        if averaged is not None:
            values["loss/averaged"] = averaged
        with self.logging_overhead():
            self._emit("evaluation", step, values)

    def report_sample(self, step: int, prompt: str, continuation: str) -> None:
        """Text from the model."""
        with self.logging_overhead():
            self._emit("sample", step, {"text": restore_interpolations(prompt) + continuation})

    def _look_at_disk(self, step: int) -> None:
        """Say when records begin to wait for room and when they have it. Raises `RankFailed` without a directory."""
        if self._place.is_gone or self._work.is_file_removed:
            words = f"{self._run_dir} or its ledger was removed while the run was writing into it, by step {step}"
            raise RankFailed(f"{words}; the run ends, and what it has trained since its last checkpoint is lost")
        waiting = self._work.pending_records + self._stream.pending_events
        if waiting and not self._disk_is_full:
            reason = self._work.write_error or self._stream.write_error
            self._disk_is_full = True
            words = f"records of {self._run_dir} cannot be written ({reason})"
            self.warn(step, f"{words}: they wait in memory until there is room, and the run goes on", about="disk")
        elif not waiting and self._disk_is_full:
            self._disk_is_full = False
            self.warn(step, "there is room again: the records that waited are written", about="disk")

    def report_checkpoint(self, saved: SaveResult) -> None:
        """A checkpoint is safe on disk, or could not be written."""
        if saved.warning is not None:
            self.warn(saved.step, saved.warning)
        if saved.failure is None:
            with self.logging_overhead():
                self._emit("checkpoint", saved.step, {"path": str(saved.path)})
        else:
            self.warn(saved.step, f"the checkpoint of step {saved.step} could not be written: {saved.failure}")

    def warn(self, step: int, text: str, about: str = "checkpoint") -> None:
        """Something has gone wrong in a way that does not end the run."""
        with self.logging_overhead():
            self._emit("warning", step, {"about": about, "message": text})
            with suppress(OSError):  # standard error may be a full disk or a closed pipe
                print(f"shoestring train: {text}", file=sys.stderr, flush=True)

    def report_trace(self, step: int, path: Path, values: Mapping[str, JSON]) -> None:
        """A timeline is written; `values` are the seconds of each term, by rank."""
        with self.logging_overhead():
            self._emit("trace", step, {"path": str(path), **values})

    def budget_halt_reason(self, done: int) -> str | None:
        """Why the run must halt after `done` steps: for its budget. None if it need not.

        Asked inside a step, whose time is charged as a whole: this is not charged to `telemetry` again.
        """
        assert self._guard is not None
        return self._guard.halt_reason(self._tokens_left(done))

    def ledger_totals(self) -> dict[str, int | str]:
        """What a checkpoint carries of the ledger."""
        with self.logging_overhead():
            self._work.sync()
            return self._ledger.summarize().checkpoint_totals()

    def close(self, step: int, reason: str, *, clean: bool = True) -> None:
        """The run ends, after `step` steps; `clean` unless a fault has ended it."""
        if clean:  # what a life was waiting for when a fault ended it belongs to its end alone
            self._charge_stall(self._gaps.pop_unaccounted_seconds())
            self._charge_telling()
        self._work.close(clean=clean)
        self._emit("budget", step, dict(_flat(self._ledger.summarize().to_json())))
        self._emit("stop", step, {"reason": reason})
        self._stream.close()
        if lost := self._stream.pending_events + self._work.pending_records:
            text = (
                f"{lost} records of the run could not be written: {self._stream.write_error or self._work.write_error}"
            )
            with suppress(OSError):
                print(f"shoestring train: {text}", file=sys.stderr, flush=True)

    def _tokens_left(self, done: int) -> int:
        return self._config.tokens_after(self._config.total_steps) - self._config.tokens_after(done)

    def _tokens_of(self, step: int) -> int:
        return self._config.tokens_after(step) - self._config.tokens_after(step - 1)

    def _emit(self, kind: str, step: int, values: Mapping[str, JSON]) -> None:
        self._stream.emit(Event(kind, step, values))


def load_balance_metrics(result: StepResult, topology: Topology) -> dict[str, JSON]:
    """Load of every routed layer's experts, ranks and nodes in this step, and the range of the routing biases.

    Maximum violation: the largest load over the mean load, minus 1; 0 is perfect balance. The load of a rank is that of
    its experts, in the replicas of the whole global batch together; a node's that of its ranks.
    """
    values: dict[str, JSON] = {}
    members = {"load": None, "load/ranks": topology.ep, "load/nodes": topology.nodes_per_ep_group}
    worst = dict.fromkeys(members, 0.0)
    for name, counts_E in result.tokens_per_expert_E.items():
        for kind, count in members.items():
            load = counts_E if count is None else counts_E.view(count, -1).sum(dim=1)
            violation = float(load.max() * load.numel() / load.sum()) - 1
            worst[kind] = max(worst[kind], violation)
            values[f"{kind}/{name}/max_violation"] = violation
        values[f"tokens_per_expert/{name}"] = counts_E.tolist()
    if result.tokens_per_expert_E:
        values |= {f"{kind}/max_violation": violation for kind, violation in worst.items()}
        values["bias/min"], values["bias/max"] = result.router_bias_range
    return values


def exchange_traffic_metrics(traffic: TrafficCounter) -> dict[str, JSON]:
    """Bytes that rank 0 has sent through the exchange in this step, by link: all of them, and those of rows alone."""
    everything, payload = traffic.bytes_by_link(), traffic.bytes_by_link(TrafficKind.PAYLOAD)
    values: dict[str, JSON] = {f"all_to_all_bytes/{link}": size for link, size in everything.items()}
    return values | {f"all_to_all_payload_bytes/{link}": size for link, size in payload.items()}


def replica_traffic_metrics(traffic: TrafficCounter) -> dict[str, JSON]:
    """Bytes of gradients and of weights that rank 0 has sent to the ranks with the same parameters, by link."""
    operations = {"reduce_scatter_bytes": REDUCE_SCATTER, "all_gather_bytes": ALL_GATHER}
    return {
        f"{key}/{link}": size
        for key, operation in operations.items()
        for link, size in traffic.bytes_by_link(operation=operation).items()
    }


def routing_metrics(result: StepResult) -> dict[str, JSON]:
    """What the routing means for the wires: how far each token travels, mean over tokens and routed layers.

    The report sends a token to 4 nodes at most and could afford 3.2 experts a node at the same cost (§3.2.2).
    """
    visits = result.token_counts
    if not visits.tokens:
        return {}
    return {
        "routing/nodes_per_token": visits.token_node_pairs / visits.tokens,
        "routing/ranks_per_token": visits.token_rank_pairs / visits.tokens,
        "routing/experts_per_token_and_node": visits.token_expert_pairs / visits.token_node_pairs,
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def charge_time(reporter: Reporter | None, bucket: str) -> AbstractContextManager[None]:
    """`Reporter.charge_time`, on the rank that has one."""
    return nullcontext() if reporter is None else reporter.charge_time(bucket)
