"""Rank 0's account of a run: what happened goes to telemetry, what it cost goes to the ledger."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comm.traffic import Kind
from .budget.meter import Meter
from .budget.render import over_budget
from .budget.summary import summarise
from .budget.totals import carry
from .budget.work import Work
from .checkpoint.saver import Saved
from .config import RunConfig
from .costs.flops import CONVENTION, FlopCount
from .costs.parameters import count_parameters
from .step import StepResult, StepSettings
from .telemetry.events import JSON, Event, EventStream
from .telemetry.open import open_stream

if TYPE_CHECKING:
    from ..comm.topology import Topology
    from ..comm.traffic import Traffic


@dataclass(frozen=True)
class Speed:
    """What the figures of a step are computed from."""

    flops: FlopCount
    peak_tflops: float


class Reporter:
    """Opens the run's event stream and its half of the ledger; every rank but the first has none."""

    def __init__(self, config: RunConfig, run_dir: Path, attempt: str) -> None:
        self._config = config
        self._run_dir = run_dir
        self._ranks = config.topology.world_size
        self._work = Work(run_dir, ranks=self._ranks, attempt=attempt, budget=config.budget)
        self._stream: EventStream = open_stream(config.telemetry, run_dir, sys.stdout)
        self._meter: Meter | None = None
        self._since = time.perf_counter()
        self._tokens_since = 0

    def run(self, speed: Speed, device: str, dtype: str) -> None:
        """What is about to run."""
        self._speed = speed
        parameters = count_parameters(self._config.model)
        peak_source = (
            "cluster.peak_tflops" if self._config.cluster.peak_tflops else "matrix product measured at the start"
        )
        values: dict[str, Any] = {
            "config": asdict(self._config),
            "ranks": self._ranks,
            "device": device,
            "compute_dtype": dtype,
            "parameters": parameters.main + parameters.mtp,
            "active_parameters": parameters.main_active + parameters.mtp_active,
            "total_steps": self._config.total_steps,
            "flops_per_token": speed.flops.with_mtp,
            "mfu_convention": f"{CONVENTION}; MTP included",
            "peak_tflops": speed.peak_tflops,
            "peak_source": peak_source,
        }
        self._emit("run", 0, values)

    def resume(self, step: int, totals: Mapping[str, int | str]) -> None:
        """The run goes on after `step` steps."""
        carry(self._work, self._run_dir, totals)
        self._work.resume(step)
        self._emit("resume", step, {})

    def start(self, path: Path) -> None:
        """The run begins with the weights of the checkpoint at `path`."""
        self._emit("start", 0, {"checkpoint": str(path)})

    def ready(self) -> None:
        """The first step begins now."""
        self._work.ready()
        self._meter = Meter(self._run_dir, ranks=self._ranks)
        self._since = time.perf_counter()

    @contextmanager
    def timing(self, bucket: str) -> Iterator[None]:
        """Charge what runs inside to a bucket of the ledger. Of these, tokens per second count waiting for data."""
        start = time.perf_counter()
        with self._work.timing(bucket):
            yield
        if bucket != "data_stall":
            self._since += time.perf_counter() - start

    def step(self, step: int, result: StepResult, settings: StepSettings, seconds: float, traffic: Traffic) -> None:
        """Step number `step` is done. Every step goes to the ledger, one in `log_every` to telemetry.

        `traffic` holds the bytes that rank 0 has sent in this step.
        """
        config = self._config
        self._work.step(step, 1000 * seconds, config.tokens_per_step)
        self._tokens_since += config.tokens_per_step
        if step % config.telemetry.log_every and step not in (1, config.total_steps):
            return
        now = time.perf_counter()
        rate = self._tokens_since / (now - self._since)
        self._since, self._tokens_since = now, 0
        assert self._meter is not None
        tflops = rate * self._speed.flops.with_mtp / self._ranks / 1e12
        values: dict[str, JSON] = {
            "loss": result.loss,
            "loss/mtp": result.mtp_loss if config.model.mtp_depth else None,
            "loss/balance": result.balance_loss,
            "loss/total": result.total_loss,
            "learning_rate": settings.learning_rate,
            "mtp_weight": settings.mtp_weight,
            "bias_speed": settings.bias_speed,
            "grad_norm": result.grad_norm,
            "tokens": step * config.tokens_per_step,
            "tokens_per_second": rate,
            "tflops": tflops,
            "mfu": tflops / self._speed.peak_tflops,
            "gpu_hours": self._meter.gpu_hours(),
            "budget_share": self._meter.budget_share(),
            "eta_seconds": (config.total_steps - step) * config.tokens_per_step / rate,
            "total_steps": config.total_steps,
            **(traffic_values(traffic) if config.exchange.name != "deepep" else {}),  # which does not say what it sends
            **balance_values(result, config.topology),
            **routing_values(result),
        }
        self._emit("step", step, values)

    def evaluation(self, step: int, loss: float, targets: int, unigram_entropy: float) -> None:
        """A validation loss, beside the entropy that knowing the frequency of each token alone would reach."""
        self._emit("evaluation", step, {"loss": loss, "targets": targets, "unigram_entropy": unigram_entropy})

    def sample(self, step: int, prompt: str, continuation: str) -> None:
        """Text from the model."""
        self._emit("sample", step, {"text": prompt + continuation})

    def checkpoint(self, saved: Saved) -> None:
        """A checkpoint is safe on disk, or could not be written."""
        if saved.failure is None:
            self._emit("checkpoint", saved.step, {"path": str(saved.path)})
        else:
            self.warn(saved.step, f"the checkpoint of step {saved.step} could not be written: {saved.failure}")

    def warn(self, step: int, text: str) -> None:
        """Something is wrong that does not end the run."""
        self._emit("warning", step, {"message": text})
        print(f"shoestring train: {text}", file=sys.stderr, flush=True)

    def trace(self, step: int, path: Path, values: Mapping[str, JSON]) -> None:
        """A timeline is written; `values` are the seconds of each term, by rank."""
        self._emit("trace", step, {"path": str(path), **values})

    def spent_budget(self) -> str | None:
        """Why the run must halt: what it has used is its budget or more. None while it is less."""
        assert self._meter is not None
        spent, budget = self._meter.gpu_hours(), self._config.budget.gpu_hours
        return over_budget(spent, budget) if spent >= budget else None

    def totals(self) -> dict[str, int | str]:
        """What a checkpoint carries of the ledger."""
        return summarise(self._run_dir).totals()

    def close(self, step: int, reason: str) -> None:
        """The run ends, after `step` steps."""
        self._work.close()
        summary = summarise(self._run_dir)
        self._emit("budget", step, dict(_flat(summary.to_json())))
        self._emit("stop", step, {"reason": reason})
        self._stream.close()

    def _emit(self, kind: str, step: int, values: Mapping[str, JSON]) -> None:
        self._stream.emit(Event(kind, step, values))


def balance_values(result: StepResult, topology: Topology) -> dict[str, JSON]:
    """Load of every routed layer's experts, ranks and nodes in this step, and the range of the routing biases.

    Maximum violation: the largest load over the mean load, minus 1; 0 is perfect balance. The load of a rank is that of
    its experts, in the replicas of the whole global batch together; a node's that of its ranks.
    """
    values: dict[str, JSON] = {}
    members = {"load": None, "load/ranks": topology.ep, "load/nodes": topology.ep_nodes}
    worst = dict.fromkeys(members, 0.0)
    for name, counts_E in result.counts_E.items():
        for kind, count in members.items():
            load = counts_E if count is None else counts_E.view(count, -1).sum(dim=1)
            violation = float(load.max() * load.numel() / load.sum()) - 1
            worst[kind] = max(worst[kind], violation)
            values[f"{kind}/{name}/max_violation"] = violation
        values[f"expert_load/{name}"] = counts_E.tolist()
    if result.counts_E:
        values |= {f"{kind}/max_violation": violation for kind, violation in worst.items()}
        values["bias/min"], values["bias/max"] = result.bias_range
    return values


def traffic_values(traffic: Traffic) -> dict[str, JSON]:
    """Bytes that rank 0 has sent through the exchange in this step, by link: all of them, and those of rows alone."""
    everything, payload = traffic.by_link(), traffic.by_link(Kind.PAYLOAD)
    values: dict[str, JSON] = {f"bytes_sent/{link}": size for link, size in everything.items()}
    return values | {f"payload_sent/{link}": size for link, size in payload.items()}


def routing_values(result: StepResult) -> dict[str, JSON]:
    """What the routing means for the wires: how far each token travels, mean over tokens and routed layers.

    The report sends a token to 4 nodes at most and could afford 3.2 experts a node at the same cost (§3.2.2).
    """
    visits = result.visits
    if not visits.tokens:
        return {}
    return {
        "routing/nodes_per_token": visits.nodes / visits.tokens,
        "routing/ranks_per_token": visits.ranks / visits.tokens,
        "routing/experts_per_token_and_node": visits.copies / visits.nodes,
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
