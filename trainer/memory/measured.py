"""Measured memory of a real rank's steps, as torch's allocator sees it.

On a CPU torch's profiler reports every allocation of torch, in all threads. It does not see other memory: buffers of
gloo and of math libraries, the interpreter, autograd's graph. On a GPU the caching allocator has counters; it does not
see the CUDA context and NCCL's buffers.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from typing_extensions import override

from ...comm.groups import ProcessGroups
from ...comm.trace import NullRecorder, TimelineTrack
from ...parallelism.pipeline.program import Op
from ..build import build_engine
from ..config import RunConfig
from ..data.samples import TokenBatch
from ..model.model import Model
from ..run.step import Stepper, StepSettings
from .peak import StateBytes

_NEVER = -100.0  # a routing bias far below any affinity, which is at most 1
# Profile memory, and neither shapes nor stacks.
_PROFILED = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())


@dataclass(frozen=True)
class MeasuredMemory:
    """Measured memory of one rank, in bytes."""

    state: StateBytes
    between_instructions: float
    """Largest memory held between two instructions, without the state."""
    total: float
    """Peak of all allocated memory."""


class AllocationMeter(NullRecorder):
    """Meter of all allocations from its construction on, and the recorder to build the rank with.

    As the recorder it sees where instructions begin and end.
    """

    is_running = False

    @override
    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        is_instruction = track is TimelineTrack.INSTRUCTION and name in list(Op)
        return self._instruction() if self.is_running and is_instruction else nullcontext()

    @contextmanager
    def _instruction(self) -> Iterator[None]:
        self.measure()
        yield
        self.measure()

    def measure(self) -> None:
        """Measure the bytes that are allocated between two instructions."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the measurement."""
        self.is_running = True

    def stop(self) -> tuple[list[int], int]:
        """Return the bytes allocated before and after each instruction, and the peak."""
        raise NotImplementedError


@contextmanager
def open_allocation_meter(device: torch.device) -> Iterator[AllocationMeter]:
    """Open the meter of `device`, before the rank is built."""
    if device.type == "cuda":
        yield _OnGpu(device)
        return
    with _OnCpu() as meter:
        yield meter


def measure_step_memory(
    config: RunConfig, groups: ProcessGroups, device: torch.device, *, skewed: bool = False
) -> MeasuredMemory:
    """Measure the second step of this rank of a new run, on random tokens. Collective.

    `skewed`: each token goes to as many experts of the first rank of its expert-parallel group as that rank has.
    """
    # The second step, because the first one allocates what later steps reuse.
    with open_allocation_meter(device) as meter:
        engine = build_engine(config, groups, device, meter)
        stepper = engine.stepper
        if skewed:
            _send_all_to_first(stepper.model)
        settings = replace(StepSettings.at_step(config, 1), router_bias_update_rate=0.0)
        generator = torch.Generator().manual_seed(config.training.seed + groups.rank)
        for step in range(2):
            batches = [_random_batch(config, generator).to(device) for _ in range(config.num_micro_batches)]
            if step:
                meter.start()
            stepper.step(batches, config.training.global_batch_size, settings)
            stepper.optimizer.wait_for_weights()
        levels, peak = meter.stop()
    engine.close()
    state = _state(stepper)
    return MeasuredMemory(state, max(levels) - state.total, peak)


def _random_batch(config: RunConfig, generator: torch.Generator) -> TokenBatch:
    shape = (config.schedule.micro_batch_size, config.tokens_per_sample)
    tokens_BW = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool))


def _send_all_to_first(model: Model) -> None:
    """Give all other ranks' experts a routing bias far below any affinity."""
    for _, router in model.routers():
        router.bias_E[model.num_local_experts :] = _NEVER


def _state(stepper: Stepper) -> StateBytes:
    fp8 = stepper.model.fp8
    buckets = stepper.optimizer.reducer.buckets
    average = 0 if stepper.ema is None else stepper.ema.nbytes
    return StateBytes(
        weights=sum(bucket.weights_N.nbytes for bucket in buckets),
        fp8_weights=0 if fp8 is None else fp8.weight_cache.last_step_bytes,
        gradients=sum(bucket.grads_N.nbytes for bucket in buckets),
        masters=sum(b.master_n.nbytes for b in buckets if b.master_n.dtype != b.weights_N.dtype),
        moments=sum(bucket.exp_avg_n.nbytes + bucket.exp_avg_sq_n.nbytes for bucket in buckets),
        average=average,
    )


class _OnCpu(AllocationMeter):
    """Meter that runs torch's profiler in every thread that records spans, and reads it at each span."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._is_on: set[int] = set()
        self._changes: list[tuple[float, int]] = []
        """Times at which allocated bytes change, and the changes; appended by all threads."""
        self._borders: list[float] = []
        """Times at which instructions begin and end."""
        self._begun_at = math.inf

    @override
    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        if threading.get_ident() == self._main:
            return super().span(track, name, detail)
        self._cut()
        return nullcontext()

    @override
    def measure(self) -> None:
        self._borders.append(self._cut())

    def __enter__(self) -> "_OnCpu":
        self._cut()
        return self

    def __exit__(self, *error: object) -> None:
        if self._main in self._is_on:
            self._read()

    @override
    def start(self) -> None:
        super().start()
        self._begun_at = self._cut()

    @override
    def stop(self) -> tuple[list[int], int]:
        self._read()
        borders, level, peak, levels = sorted(self._borders), 0, 0, []
        for instant, change in [*sorted(self._changes), (math.inf, 0)]:
            while borders and borders[0] <= instant:
                levels.append(level)
                del borders[0]
            level += change
            peak = max(peak, level) if instant >= self._begun_at else 0
        return levels, peak

    def _cut(self) -> float:
        """Read this thread's profiler and restart it; return the time of its last event."""
        instant = self._read() if threading.get_ident() in self._is_on else -math.inf
        _enable_profiler_legacy(_PROFILED)
        self._is_on.add(threading.get_ident())
        return instant

    def _read(self) -> float:
        """Stop this thread's profiler and keep its allocations; return the time of its last event."""
        events: list[Any] = [event for of_thread in _disable_profiler_legacy() for event in of_thread]
        self._is_on.remove(threading.get_ident())
        self._changes += [(e.start_us(), e.cpu_memory_usage()) for e in events if e.kind() == "memory_alloc"]
        return max(float(event.start_us()) for event in events)


class _OnGpu(AllocationMeter):
    """Meter that reads the caching allocator's counters. Not yet run on hardware."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._levels: list[int] = []

    @override
    def measure(self) -> None:
        self._levels.append(torch.cuda.memory_allocated(self._device))

    @override
    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        super().start()

    @override
    def stop(self) -> tuple[list[int], int]:
        return self._levels, torch.cuda.max_memory_allocated(self._device)
