"""One rank of a run, built and stepped once on a device that computes nothing."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch.distributed._tools import fake_collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

from ...comm.errors import ConfigError, Problem
from ...comm.groups import ProcessGroups
from ...trainer.build import Engine, open_engine, stages_of
from ...trainer.config import RunConfig, value_at
from ...trainer.data.samples import TokenBatch
from ...trainer.memory.forecast import RunMemory
from ...trainer.memory.peak import RankMemory
from ...trainer.run.step import StepSettings
from ..compose import compose_run
from .configured import DEVICE, on_gpu
from .device.fake_device import RehearsedDevice
from .device.groups import LoggedGroups
from .device.oracle import BalancedOracle
from .device.places import NO_PLACE
from .device.recorder import RankRecorder
from .device.routing import BalancedRouting
from .device.spans import Spans
from .device.stand_ins import standing_in
from .device.streams import LoggedStreams
from .log import Memory, RankLog

assert fake_collectives.collective_ops  # its import registers what collectives do to fake tensors


@dataclass(frozen=True)
class RankRehearsal:
    """One rank's run and its first step."""

    config: RunConfig
    rank: int
    sequences: int
    """Of the step, over all ranks."""

    @staticmethod
    def of(overrides: Sequence[str], config_dir: Path | None, rank: int, micro_batches: int | None) -> RankRehearsal:
        """Compose the run as its GPUs would see it. Raises `ConfigError`."""
        config = on_gpu(compose_run(overrides, config_dir), micro_batches)
        if not 0 <= rank < config.topology.world_size:
            hint = f"must be from 0 to {config.topology.world_size - 1}"
            raise ConfigError([Problem("--ranks", rank, hint)])
        return RankRehearsal(config, rank, config.batches.size(1))

    @property
    def micro_batches(self) -> int:
        """Of this rank in the step."""
        return self.sequences // self.config.share

    @property
    def predicted(self) -> RankMemory:
        """Memory of the rank in such a step, on a GPU."""
        training = replace(
            self.config.training, global_batch=self.sequences, ramp_from=None, ramp_step=None, ramp_tokens=0
        )
        memory = RunMemory(replace(self.config, training=training), torch.device("cuda"))
        return memory.of(self.config.topology.pp_rank(self.rank))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What stands for numbers that only a GPU would have."""
        routing = BalancedRouting.of(self.config)
        rows = int(routing.copies.sum()) // routing.ranks
        return (
            f"routing is balanced: the experts of each rank receive {rows} rows a micro-batch, and a token visits"
            f" {routing.visits_of_ranks:.2f} ranks in {routing.visits_of_nodes:.2f} nodes",
            "every loss, count and norm that the host reads is 1",
        )

    def run(self) -> RankLog:
        """Build the rank and take the step; what is raised meanwhile is a finding."""
        began = time.perf_counter()
        ledger = RankRecorder(Spans("building"))
        memory = _Levels()
        groups = LoggedGroups(self.rank, ledger)
        with _noting_warnings(ledger):
            try:
                self._step(ledger, groups, memory)
            except Exception as error:
                kind = type(error).__name__
                place = f"{ledger.spans.where}: {ledger.places.of_error(error)}"
                ledger.find("error", f"{kind}: {error}", place)
        return RankLog(
            rank=self.rank,
            pp_rank=self.config.topology.pp_rank(self.rank),
            world_size=self.config.topology.world_size,
            micro_batches=self.micro_batches,
            group_creations=groups.calls,
            operations=ledger.operations,
            events=tuple(ledger.events),
            memory=self._memory(ledger, memory),
            launches=ledger.launches,
            findings=ledger.findings,
            assumptions=self.assumptions,
            seconds=time.perf_counter() - began,
        )

    def _step(self, ledger: RankRecorder, logged: LoggedGroups, levels: _Levels) -> None:
        topology, training = self.config.topology, self.config.training
        dist.init_process_group("fake", rank=self.rank, world_size=topology.world_size, store=FakeStore())
        limit = timedelta(seconds=training.collective_timeout_seconds)
        holders = stages_of(self.config).all_holders()
        groups = ProcessGroups.create(topology, self.rank, limit, holders, logged)
        device = RehearsedDevice(ledger, BalancedOracle(self.config, self.rank, ledger.spans))
        with standing_in(device), device:
            engine = open_engine(self.config, groups, DEVICE, ledger.spans, LoggedStreams(ledger))
            levels.state, levels.building = ledger.memory.now, ledger.memory.peak
            ledger.spans.begin("step")
            ledger.begin_step()
            self._take_step(engine)

    def _take_step(self, engine: Engine) -> None:
        """The run's first, as `trainer.loop` takes it."""
        config = self.config
        settings = StepSettings(
            learning_rate=config.optimizer.learning_rate(config.tokens_after(1)),
            clip_norm=config.optimizer.clip_norm,
            balance_weight=config.training.balance_weight,
            mtp_weight=value_at(config.training.mtp_weight, 0),
            bias_speed=value_at(config.training.bias_speed, 0),
        )
        engine.traffic.clear()
        engine.stepper.step(list(self._batches()), self.sequences, settings)
        engine.stepper.optimizer.wait()

    def _batches(self) -> Iterator[TokenBatch]:
        for _ in range(self.micro_batches):
            tokens_BW = torch.zeros((self.config.schedule.micro_batch, self.config.window), dtype=torch.int64)
            yield TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)).to(DEVICE)

    def _memory(self, ledger: RankRecorder, levels: _Levels) -> Memory:
        predicted, live = self.predicted, ledger.memory
        size = self.config.cluster.memory_gb
        capacity = None if size is None else size * 1e9 - predicted.fixed
        if capacity is not None and max(live.peak, levels.building) > capacity:
            worst = max(live.peak, levels.building)
            phase = live.peak_phase if live.peak >= levels.building else "building"
            text = f"{worst / 1e9:.1f} GB are alive in {phase}, and the GPU has {capacity / 1e9:.1f} GB for tensors"
            ledger.find("memory", text, phase)
        return Memory(
            state=levels.state,
            building=levels.building,
            peak=live.peak,
            peak_phase=live.peak_phase,
            by_phase=live.by_phase,
            predicted=predicted.allocated,
            capacity=capacity,
        )


@dataclass
class _Levels:
    """Bytes that are alive."""

    state: int = 0
    building: int = 0


@contextmanager
def _noting_warnings(ledger: RankRecorder) -> Iterator[None]:
    """Calls of ours that warn of their end are findings, each once."""

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        place = ledger.places.of_event(sys._getframe())
        is_deprecation = issubclass(category, DeprecationWarning | FutureWarning) or "deprecated" in str(message)
        if is_deprecation and place != NO_PLACE:
            ledger.find("deprecated", str(message).strip().splitlines()[0], place)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = note
        yield
