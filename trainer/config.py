"""One run's whole configuration, and the checks that need more than one part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, runtime_checkable

import torch

from ..comm.errors import Problem, UnreadableFields
from ..comm.exchange.config import ExchangeConfig
from ..comm.topology import Topology
from ..parallelism.pipeline.partition import partition_problems
from ..parallelism.pipeline.schedules.registry import (
    SCHEDULES,
    build_placement,
    nearest_valid_micro_batches,
    schedule_problems,
)
from .costs.cluster import ClusterConfig
from .data.config import DataConfig
from .ledger.config import BudgetConfig
from .model.attention_backend import GPU_BACKENDS, AttentionShape, unsupported_shape_reasons
from .model.config import ModelConfig
from .model.recompute import RecomputeConfig, RecomputeModule
from .optimizer.config import OptimizerConfig
from .precision.config import PrecisionConfig
from .run.batch_ramp import BatchRamp, make_batch_ramp
from .structured_config import reset_to_defaults
from .telemetry.config import TelemetryConfig


def scheduled_value(schedule: Mapping[int, float], tokens: int) -> float:
    """The value in force after `tokens` consumed tokens: that of the largest key not above them."""
    return schedule[max(start for start in schedule if start <= tokens)]


def value_schedule_problems(field: str, schedule: Mapping[int, float]) -> Iterator[Problem]:
    """What is impossible about such a schedule: it must start at 0 and hold no negative value."""
    if 0 not in schedule:
        yield Problem(field, dict(schedule), "must say the value from the start: {0: …}")
    for start, value in schedule.items():
        if start < 0 or value < 0:
            yield Problem(field, {start: value}, "token counts and values must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """In which order the ranks of a pipeline run the micro-batches of a step, and which layers they hold."""

    name: str = "1f1b"
    """`gpipe`, `1f1b`, `interleaved`, `zb_h1`, `dualpipe` or `dualpipev`; see `shoestring schedule`."""
    micro_batch_size: int = 1
    """Sequences of one micro-batch on one rank."""
    chunks: int | None = None
    """Stages a rank holds, for `interleaved`; null: as many as the schedule asks for."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each stage; null: balanced by FLOPs, see `shoestring partition`."""
    overlap: bool = True
    """Whether the forward and the backward of an FB take turns, so that one computes while the other's tokens travel;
    else the forward runs first. The numbers are the same to the last bit."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        names = [schedule.name for schedule in SCHEDULES]
        if self.name not in names:
            yield Problem("name", self.name, f"no such schedule; there are: {', '.join(names)}")
        if self.micro_batch_size < 1:
            yield Problem("micro_batch_size", self.micro_batch_size, "must be at least 1")
        for name, most in (("micro_batch_size", 2**20), ("chunks", 4096)):
            if (self.__dict__[name] or 0) > most:
                yield Problem(name, self.__dict__[name], f"must be at most {most}: no machine trains more")


_TIMEOUTS = ("collective_timeout_seconds", "start_timeout_seconds", "rendezvous_timeout_seconds", "stop_seconds")
_MOST = {"tokens": 10**18, "sequence_length": 2**24, "global_batch_size": 2**31} | dict.fromkeys(_TIMEOUTS, 10**7)
"""Of training's numbers: 60,000 times DeepSeek-V3's tokens, a context of 16 million, four months of waiting."""
_MOST_LEVELS = 100_000
"""Sizes of a growing batch."""
_MOST_MICRO_BATCHES = 2**16
"""Of one rank in one step: each is some instructions of a program that is made and checked before the run."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What is trained for how long, and how often it is looked at."""

    run_dir: str = "runs/default"
    """Everything a run writes is here. A run that finds its own checkpoint here goes on from it."""
    start_from: str | None = None
    """A run, an import or one checkpoint, whose weights and routing biases a new run begins with, at step 0; null for
    random ones. A run that has checkpoints goes on from these."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU for each process where there are enough, else the CPU."""
    attention_backend: str = "auto"
    """What computes attention on GPUs: `cudnn`, `flash3`, `efficient`, `math`, or `auto`, the first of them that serves
    the run (see `shoestring doctor`). CPUs have a way of their own, and no choice."""
    seed: int = 0
    """Of the initial weights and of the order of samples."""
    tokens: int = 1_000_000
    """Train until at least this many tokens are consumed; the last step is a whole one."""
    sequence_length: int = 128
    """S, inputs of one sample."""
    global_batch_size: int = 16
    """Sequences of one optimizer step over all ranks."""
    rampup_start_batch_size: int | None = None
    """Sequences of the first step; the batch then grows to `global_batch`. null: it is that from the start."""
    rampup_batch_size_increment: int | None = None
    """Sequences by which it grows at a time; null without a ramp."""
    rampup_tokens: int = 0
    """Consumed tokens over which it grows, an equal share of them with each size."""
    seq_aux_loss_coeff: float = 1e-4
    """α of the sequence-wise balance loss (eq. 17)."""
    mtp_loss_scaling_factor: dict[int, float] = field(default_factory=lambda: {0: 0.3})
    """λ of the MTP loss (eq. 25) from a count of consumed tokens on."""
    router_bias_update_rate: dict[int, float] = field(default_factory=lambda: {0: 0.001})
    """γ, by how much a step moves a routing bias, from a count of consumed tokens on."""
    evaluate_every: int = 100
    """Steps between evaluations on the whole validation split; 0 for the end alone."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 for the end alone."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay. Where the disk has no room for one more beside them, the oldest goes
    before a save instead of after it; the newest always stays."""
    max_failed_saves: int = 3
    """After so many saves in a row that have failed the run ends: what it trains from there on could only be lost.
    A disk that is full gets ten seconds at least."""
    sample_prompt: str = "ROMEO"
    """Text that the sample at the end continues."""
    sample_tokens: int = 100
    """Length of that sample; 0 for none."""
    collective_timeout_seconds: int = 300
    """A collective that waits longer than this ends the run."""
    start_timeout_seconds: int = 1800
    """How long ranks may take to find each other and to connect, once: at 2048 ranks one store serves them all."""
    rendezvous_timeout_seconds: int = 300
    """How long the machines of a launch wait for each other before any of them starts a rank."""
    stop_seconds: int = 300
    """After SIGTERM or SIGUSR1: the time for the step under way and a checkpoint. A run that needs longer is ended."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        values = self.__dict__
        if self.device not in ("auto", "cpu", "cuda"):
            yield Problem("device", self.device, "must be auto, cpu or cuda")
        if self.attention_backend != "auto" and self.attention_backend not in GPU_BACKENDS:
            yield Problem("attention_backend", self.attention_backend, f"must be auto, {', '.join(GPU_BACKENDS)}")
        elif self.attention_backend != "auto" and self.device == "cpu":
            yield Problem(
                "attention_backend",
                self.attention_backend,
                "is for GPUs: write auto, or training.device=cuda",
                ("device",),
            )
        at_least_one = ["tokens", "sequence_length", "global_batch_size", "keep_checkpoints", "max_failed_saves"]
        for name in (*at_least_one, *_TIMEOUTS):
            if values[name] < 1:
                yield Problem(name, values[name], "must be at least 1")
        for name, most in _MOST.items():
            if values[name] > most:
                yield Problem(name, values[name], f"must be at most {most:,}")
        if self.rampup_start_batch_size is not None and not 1 <= self.rampup_start_batch_size <= self.global_batch_size:
            hint = f"must be from 1 to global_batch = {self.global_batch_size}, or null"
            yield Problem("rampup_start_batch_size", self.rampup_start_batch_size, hint, ("global_batch_size",))
        if self.rampup_batch_size_increment is not None and self.rampup_batch_size_increment < 1:
            yield Problem(
                "rampup_batch_size_increment", self.rampup_batch_size_increment, "must be at least 1, or null"
            )
        elif (
            None not in (self.rampup_start_batch_size, self.rampup_batch_size_increment) and self._levels > _MOST_LEVELS
        ):
            hint = f"gives {self._levels} sizes of the batch; at most {_MOST_LEVELS}: grow by more at a time"
            yield Problem("rampup_batch_size_increment", self.rampup_batch_size_increment, hint)
        for name, missing in (("rampup_batch_size_increment", None), ("rampup_tokens", 0)):
            if (values[name] == missing) != (self.rampup_start_batch_size is None):
                hint = "goes with rampup_start_batch_size: write it, rampup_batch_size_increment and rampup_tokens, or none (null, null and 0)"
                yield Problem(name, values[name], hint, ("rampup_start_batch_size",))
        for name in (
            "seq_aux_loss_coeff",
            "evaluate_every",
            "checkpoint_every",
            "sample_tokens",
            "seed",
            "rampup_tokens",
        ):
            if values[name] < 0:
                yield Problem(name, values[name], "must be at least 0")
        if self.seed >= 2**63:
            yield Problem("seed", self.seed, "must be less than 2**63, to fit the generators")
        if not self.run_dir:
            yield Problem("run_dir", self.run_dir, "must name a directory")
        if self.sample_tokens > 0 and not self.sample_prompt:
            hint = "must hold text, or write training.sample_tokens=0"
            yield Problem("sample_prompt", self.sample_prompt, hint, ("sample_tokens",))
        yield from value_schedule_problems("mtp_loss_scaling_factor", self.mtp_loss_scaling_factor)
        yield from value_schedule_problems("router_bias_update_rate", self.router_bias_update_rate)

    @property
    def _levels(self) -> int:
        """Sizes that a growing batch has."""
        return -(
            -(self.global_batch_size - (self.rampup_start_batch_size or 1)) // (self.rampup_batch_size_increment or 1)
        )


NO_UNREADABLE_FIELDS = UnreadableFields()

# Of checks between several values: what they look at.
_SHARE = ("topology.edp", "topology.ep", "schedule.micro_batch_size")
_STAGES = ("schedule.name", "schedule.chunks", "topology.pp")
_ATTENTION = ("model", "precision.compute", "training.sequence_length", "schedule.micro_batch_size")
_RAMP = (
    "training.rampup_start_batch_size",
    "training.rampup_batch_size_increment",
    "training.rampup_tokens",
    "training.global_batch_size",
)


@runtime_checkable
class _Checked(Protocol):
    def problems(self) -> Iterator[Problem]: ...


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run. Each field but `training` and `telemetry` is a group of files in `conf/`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    topology: Topology = field(default_factory=Topology)
    """Over which ranks."""
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    """How tokens reach their experts."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """In which numbers."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """By which rule."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """In which order."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """What the backward makes again instead of keeping."""
    data: DataConfig
    """On which text."""
    budget: BudgetConfig
    """For how many GPU-hours."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """On which hardware."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """For how long."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Told to whom."""

    @property
    def batch_ramp(self) -> BatchRamp:
        """Sequences of every optimizer step."""
        training = self.training
        if training.rampup_start_batch_size is None or training.rampup_batch_size_increment is None:
            return BatchRamp.constant(training.global_batch_size)
        sizes = training.rampup_start_batch_size, training.rampup_batch_size_increment, training.global_batch_size
        return make_batch_ramp(*sizes, training.rampup_tokens, training.sequence_length)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.batch_ramp.steps_for_samples(-(-self.training.tokens // self.training.sequence_length))

    def tokens_after(self, steps: int) -> int:
        """Input tokens that the first `steps` optimizer steps consume."""
        return self.batch_ramp.consumed_samples(steps) * self.training.sequence_length

    @property
    def tokens_per_sample(self) -> int:
        """W: tokens of one sample, with the targets of the last input."""
        return self.training.sequence_length + 1 + self.model.num_nextn_predict_layers

    @property
    def global_micro_batch_size(self) -> int:
        """Sequences of one micro-batch on all data-parallel ranks together."""
        return self.topology.dp * self.schedule.micro_batch_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one rank in one step of `global_batch` sequences."""
        return self.training.global_batch_size // self.global_micro_batch_size

    @property
    def expert_block_rows(self) -> int:
        """Rows that the experts of one rank compute at once: see `RecomputeConfig`."""
        return self.recompute.resolve_expert_block_rows(
            self.schedule.micro_batch_size * self.training.sequence_length * self.model.num_experts_per_tok
        )

    def attention_shape(self, dtype: torch.dtype) -> AttentionShape:
        """The attention of one micro-batch on one rank, computed in `dtype`."""
        model = self.model
        widths = (model.qk_head_dim, model.v_head_dim)
        return AttentionShape(
            self.schedule.micro_batch_size,
            model.num_attention_heads,
            self.training.sequence_length,
            *widths,
            dtype=dtype,
        )

    def problems(self, doubt: UnreadableFields = NO_UNREADABLE_FIELDS) -> Iterator[Problem]:
        """Everything impossible about this configuration that needs neither disk nor processes to see.

        Values that are impossible on their own make way for defaults, so that everything else can be looked at too;
        what is then found by looking at such a default, or at a value in `doubt`, is nobody's mistake and left out.
        """
        alone = [problem for problem in self._part_problems() if not problem.related_fields]
        yield from (problem for problem in alone if not doubt.covers(problem.field))
        replaced = {problem.field for problem in alone}
        possible, unsound = reset_to_defaults(self, replaced), doubt.with_fields(replaced)
        together = [problem for problem in possible._part_problems() if problem.related_fields]
        for problem in (*together, *possible._cross_problems()):
            if not any(unsound.covers(key) for key in (problem.field, *problem.related_fields)):
                yield problem

    def _part_problems(self) -> Iterator[Problem]:
        for part in fields(self):
            value = self.__dict__[part.name]
            assert isinstance(value, _Checked)
            yield from (problem.with_prefix(part.name) for problem in value.problems())

    def _cross_problems(self) -> Iterator[Problem]:
        model, topology, training = self.model, self.topology, self.training
        if model.n_routed_experts % topology.ep:
            hint = f"must divide model.n_routed_experts = {model.n_routed_experts}: every rank holds as many experts"
            yield Problem("topology.ep", topology.ep, hint, ("model.n_routed_experts",))
        share = self.global_micro_batch_size
        if training.global_batch_size % share:
            parts = f"edp x ep x micro_batch = {topology.edp} x {topology.ep} x {self.schedule.micro_batch_size}"
            nearest = max(1, round(training.global_batch_size / share)) * share
            hint = f"must be a multiple of {share} ({parts}); the nearest is {nearest}"
            yield Problem("training.global_batch_size", training.global_batch_size, hint, _SHARE)
        if self.precision.linear == "fp8" and RecomputeModule.GATE_UP in self.recompute.modules:
            hint = "saves nothing in FP8, which keeps the tiles of gate and up projections; leave gate_up out"
            yield Problem("recompute.modules", self.recompute.modules, hint, ("precision.linear",))
        if training.attention_backend != "auto":
            case = self.attention_shape(self.precision.compute_dtype(torch.device("cuda")))
            for reason in unsupported_shape_reasons(training.attention_backend, case):
                yield Problem("training.attention_backend", training.attention_backend, reason, _ATTENTION)
        if training.global_batch_size > share * _MOST_MICRO_BATCHES:
            count = f"gives {training.global_batch_size // share} micro-batches of {share} sequences a step"
            hint = f"{count}; at most {_MOST_MICRO_BATCHES}: take more ranks or larger micro-batches"
            yield Problem("training.global_batch_size", training.global_batch_size, hint, _SHARE)
        else:
            yield from self._schedule_problems(share)
        yield from self._alignment_problems()
        if self.data.vocab_size != model.vocab_size:
            hint = f"must equal model.vocab_size = {model.vocab_size}"
            yield Problem("data.vocab_size", self.data.vocab_size, hint, ("model.vocab_size",))

    def _schedule_problems(self, share: int) -> Iterator[Problem]:
        """What schedule and split into stages demand; `share` is a micro-batch on every rank, in sequences."""
        schedule, ranks, layers = self.schedule, self.topology.pp, self.model.num_hidden_layers
        yield from self._ramp_problems(share)
        found = list(schedule_problems(schedule.name, ranks, self.num_micro_batches, schedule.chunks))
        for problem in found:
            if problem.field == "micro_batches" and self.training.global_batch_size % share:
                continue  # their number is not known yet
            if problem.field == "micro_batches":
                hint = f"gives {self.num_micro_batches} micro-batches of {share} sequences a step; {problem.hint}"
                yield Problem("training.global_batch_size", self.training.global_batch_size, hint, (*_STAGES, *_SHARE))
            else:
                field = {"ranks": "topology.pp", "chunks": "schedule.chunks"}[problem.field]
                yield Problem(field, problem.value, problem.hint, _STAGES)
        if any(problem.field != "micro_batches" for problem in found):
            return
        stages = build_placement(schedule.name, ranks, schedule.chunks).num_stages
        if stages > layers:
            hint = f"gives {stages} stages with {schedule.name}, and each must hold one of {layers} layers at least"
            yield Problem("topology.pp", ranks, hint, (*_STAGES, "model.num_hidden_layers"))
        elif schedule.layers_per_stage is not None:
            for problem in partition_problems(layers, stages, schedule.layers_per_stage):
                yield replace(problem.with_prefix("schedule"), related_fields=(*_STAGES, "model.num_hidden_layers"))

    def _ramp_problems(self, share: int) -> Iterator[Problem]:
        """Every size of a growing batch must be legal; the first that is not is named, with the nearest that is."""
        for number, level in enumerate(self.batch_ramp.levels[:-1]):
            found = next(self._size_problems(level.batch_size, share, is_first=number == 0), None)
            if found is not None:
                yield found
                return

    def _size_problems(self, size: int, share: int, *, is_first: bool) -> Iterator[Problem]:
        """What keeps a step of the ramp from taking `size` sequences."""
        schedule, training = self.schedule, self.training
        name = "rampup_start_batch_size" if is_first else "rampup_batch_size_increment"
        field, value, judges = f"training.{name}", training.__dict__[name], (*_STAGES, *_SHARE, *_RAMP)
        when = "in the first step" if is_first else f"in steps of {size}"
        if size % share:
            gives = f"gives {size / share:g} micro-batches of {share} sequences {when}, and not a whole number"
            nearest = (
                nearest_valid_micro_batches(schedule.name, self.topology.pp, round(size / share), schedule.chunks)
                * share
            )
            yield Problem(field, value, f"{gives}; the nearest legal batch is {nearest}", judges)
            return
        for problem in schedule_problems(schedule.name, self.topology.pp, size // share, schedule.chunks):
            if problem.field == "micro_batches":
                gives = f"gives {size // share} micro-batches of {share} sequences {when}"
                yield Problem(field, value, f"{gives}; {problem.hint}", judges)

    def _alignment_problems(self) -> Iterator[Problem]:
        """Grouped GEMMs want rows of whole 16 bytes; FP64 has a path of its own."""
        if self.precision.compute == "float64" or self.model.num_moe_layers + self.model.num_nextn_predict_layers == 0:
            return
        step = 4 if self.precision.compute == "float32" else 8  # auto may become BF16
        for name, width in (
            ("hidden_size", self.model.hidden_size),
            ("moe_intermediate_size", self.model.moe_intermediate_size),
        ):
            if width % step:
                hint = f"must be a multiple of {step}, for rows of whole 16 bytes"
                judges = (
                    "precision.compute",
                    "model.num_hidden_layers",
                    "model.first_k_dense_replace",
                    "model.num_nextn_predict_layers",
                )
                yield Problem(f"model.{name}", width, hint, judges)
