"""Rehearsal of one rank: build it and run one step on a device that computes nothing."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._tools import fake_collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

from ...comm.groups import ProcessGroups
from ...trainer.build import TrainingEngine, build_engine, build_stage_layout
from ...trainer.config import RunConfig, scheduled_value
from ...trainer.data.samples import TokenBatch
from ...trainer.memory.forecast import MemoryPredictor
from ...trainer.run.step import StepSettings
from .device.code_locations import AUTOGRAD_LOCATION, error_location, line_location
from .device.fake_device import FakeDeviceMode
from .device.groups import LoggedGroupFactory
from .device.patches import patch_triton_and_threads
from .device.readback import BalancedReadback
from .device.recorder import LiveTensorMemory, RankRecorder
from .device.routing import BalancedRouting
from .device.spans import RehearsalSpanRecorder
from .device.streams import LoggedStreams
from .findings import ERROR_KIND
from .gpu_config import FAKE_DEVICE
from .log import DeviceMemoryRecord, RankLog

assert fake_collectives.collective_ops  # its import registers the fake kernels of collectives


@dataclass(frozen=True)
class RankRehearsal:
    """Rehearsal of one rank's first step. `config` is the run as on its GPUs, see `gpu_run_config`."""

    config: RunConfig
    rank: int

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Assumed values of numbers that only a GPU computes, for the report."""
        routing = BalancedRouting.from_config(self.config)
        rows = int(routing.rows_by_expert.sum()) // routing.ranks
        return (
            f"routing is balanced: the experts of each rank receive {rows} rows per micro-batch, and each token is sent"
            f" to {routing.mean_ranks_per_token:.2f} ranks on {routing.mean_nodes_per_token:.2f} nodes",
            "every loss, count and norm that the host reads is 1",
        )

    def run(self) -> RankLog:
        """Build the rank and run the step; an exception becomes a finding."""
        began = time.perf_counter()
        recorder = RankRecorder(RehearsalSpanRecorder("building"))
        groups = LoggedGroupFactory(self.rank, recorder)
        with _record_deprecations(recorder):
            try:
                self._step(recorder, groups)
            except Exception as error:
                kind = type(error).__name__
                place = f"{recorder.spans.current_instruction}: {error_location(error)}"
                recorder.record_finding(ERROR_KIND, f"{kind}: {error}", place)
        return RankLog(
            rank=self.rank,
            pp_rank=self.config.topology.pp_rank(self.rank),
            world_size=self.config.topology.world_size,
            micro_batches=self.config.num_micro_batches,
            group_creations=groups.creation_calls,
            operations=recorder.operations,
            events=tuple(recorder.events),
            memory=self._memory(recorder.memory),
            launches=recorder.launches,
            findings=recorder.findings,
            assumptions=self.assumptions,
            seconds=time.perf_counter() - began,
        )

    def _step(self, recorder: RankRecorder, logged: LoggedGroupFactory) -> None:
        topology, training = self.config.topology, self.config.training
        dist.init_process_group("fake", rank=self.rank, world_size=topology.world_size, store=FakeStore())
        limit = timedelta(seconds=training.collective_timeout_seconds)
        replica_groups = build_stage_layout(self.config).replica_pp_groups()
        groups = ProcessGroups.create(topology, self.rank, limit, replica_groups, logged)
        device = FakeDeviceMode(recorder, BalancedReadback(self.config, self.rank, recorder.spans))
        with patch_triton_and_threads(device), device:
            engine = build_engine(self.config, groups, FAKE_DEVICE, recorder.spans, LoggedStreams(recorder))
            recorder.spans.set_base_phase("step")
            recorder.begin_step()
            self._take_step(engine)

    def _take_step(self, engine: TrainingEngine) -> None:
        """Run the first step as `trainer.loop` does."""
        config = self.config
        settings = StepSettings(
            learning_rate=config.optimizer.learning_rate_at(config.tokens_after(1)),
            clip_norm=config.optimizer.clip_norm,
            seq_aux_loss_coeff=config.training.seq_aux_loss_coeff,
            mtp_loss_scaling_factor=scheduled_value(config.training.mtp_loss_scaling_factor, 0),
            router_bias_update_rate=scheduled_value(config.training.router_bias_update_rate, 0),
        )
        engine.exchange_traffic.reset()
        engine.stepper.step(list(self._batches()), config.training.global_batch_size, settings)
        engine.stepper.optimizer.wait_for_weights()

    def _batches(self) -> Iterator[TokenBatch]:
        for _ in range(self.config.num_micro_batches):
            tokens_BW = torch.zeros(
                (self.config.schedule.micro_batch_size, self.config.tokens_per_sample), dtype=torch.int64
            )
            yield TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)).to(FAKE_DEVICE)

    def _memory(self, live: LiveTensorMemory) -> DeviceMemoryRecord:
        predictor = MemoryPredictor(self.config, torch.device("cuda"))
        predicted = predictor.predict_rank(self.config.topology.pp_rank(self.rank))
        size = self.config.cluster.memory_gb
        return DeviceMemoryRecord(
            state_bytes=live.state_bytes,
            peak_while_building_bytes=live.peak_while_building_bytes,
            peak_bytes=live.peak_bytes,
            peak_phase=live.peak_phase,
            peak_bytes_by_phase=live.peak_bytes_by_phase,
            predicted_peak_bytes=predicted.allocator_bytes,
            capacity_bytes=None if size is None else size * 1e9 - predicted.non_allocator.total,
        )


@contextmanager
def _record_deprecations(recorder: RankRecorder) -> Iterator[None]:
    """Record each call from our code to a deprecated function as a finding, once."""

    def record(message: Warning | str, category: type[Warning], *_place: Any, **_options: Any) -> None:
        place = line_location(sys._getframe())
        is_deprecation = issubclass(category, DeprecationWarning | FutureWarning) or "deprecated" in str(message)
        if is_deprecation and place != AUTOGRAD_LOCATION:
            recorder.record_finding("deprecated", str(message).strip().splitlines()[0], place)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = record
        yield
