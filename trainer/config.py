"""Configuration of a training run, and the checks that involve more than one of its groups."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from typing_extensions import override

from ..comm.errors import Problem, UnreadableFields
from ..comm.exchange.config import ExchangeConfig
from ..comm.files.ranges import CheckedConfig, at_least, between, not_empty, one_of
from ..comm.files.strict_json import MAX_INTEGER
from ..comm.topology import Topology
from ..comm.units import ceil_div
from ..parallelism.pipeline.config import ScheduleConfig
from ..parallelism.pipeline.partition import partition_problems
from ..parallelism.pipeline.schedules.registry import (
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
    """Return the value of the largest key that is at most `tokens`, the number of consumed tokens."""
    return schedule[max(start for start in schedule if start <= tokens)]


def value_schedule_problems(field: str, schedule: Mapping[int, float]) -> Iterator[Problem]:
    """Yield a problem for a value schedule that does not start at 0 or holds a negative number."""
    if 0 not in schedule:
        yield Problem(field, dict(schedule), "must give the value from the start of training: {0: …}")
    for start, value in schedule.items():
        if start < 0 or value < 0:
            yield Problem(field, {start: value}, "token counts and values must be at least 0")


_TIMEOUT = 10**7
"""Longest timeout in seconds: four months."""
_MOST_LEVELS = 100_000
"""Largest number of batch sizes in a ramp."""
# Each micro-batch is several instructions of a program that is built and checked before the run starts.
_MOST_MICRO_BATCHES = 2**16
"""Largest number of micro-batches per rank and step."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(CheckedConfig):
    """Length of training, batch size, loss coefficients, evaluation, checkpoints and timeouts."""

    run_dir: str = not_empty("runs/default", "must name a directory")
    """Directory of everything that the run writes. A run that finds its checkpoints there resumes from the latest."""
    start_from: str | None = None
    """Directory of a run, of an imported model or of one checkpoint, whose weights and routing biases a new run starts
    with at step 0; null: random weights. Ignored once the run has checkpoints."""
    device: str = one_of(("auto", "cpu", "cuda"), "auto")
    """`cpu`, `cuda` or `auto`: one GPU per process if there are enough, else the CPU."""
    attention_backend: str = one_of(("auto", *GPU_BACKENDS), "auto")
    """Attention kernel on GPUs: `cudnn`, `flash3`, `efficient`, `math`, or `auto`, the first of them that supports the
    run (see `shoestring doctor`). On CPUs it must be `auto`."""
    seed: int = between(0, MAX_INTEGER, 0, most_reason=", the limit of random generators")
    """Seed of the initial weights and of the sample order."""
    tokens: int = between(1, 10**18, 1_000_000)  # at most 60,000 times DeepSeek-V3's
    """Tokens to train on. Steps are whole, so the last step may go beyond this number."""
    sequence_length: int = between(1, 2**24, 128)
    """S, input tokens per sample."""
    global_batch_size: int = between(1, 2**31, 16)
    """Sequences per optimizer step over all ranks; a multiple of edp · ep · `schedule.micro_batch_size`."""
    rampup_start_batch_size: int | None = at_least(1, None)
    """Sequences of the first step, from which the batch grows to `global_batch_size`; null: no ramp."""
    rampup_batch_size_increment: int | None = at_least(1, None)
    """Sequences by which the batch grows at a time; null: no ramp."""
    rampup_tokens: int = at_least(0, 0)
    """Consumed tokens over which the batch grows, divided equally among its sizes; 0: no ramp."""
    seq_aux_loss_coeff: float = at_least(0, 1e-4)
    """Coefficient α of the sequence-wise balance loss (report eq. 17)."""
    mtp_loss_scaling_factor: dict[int, float] = field(default_factory=lambda: {0: 0.3})
    """Weight λ of the MTP loss (report eq. 25), as a mapping from consumed tokens to the value from then on."""
    router_bias_update_rate: dict[int, float] = field(default_factory=lambda: {0: 0.001})
    """Amount γ by which a step changes a routing bias (report §2.1.2), as a mapping from consumed tokens to the value
    from then on."""
    evaluate_every: int = at_least(0, 100)
    """Steps between evaluations on the whole validation split; 0: at the end only."""
    checkpoint_every: int = at_least(0, 100)
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = at_least(1, 2)
    """Number of latest checkpoints to keep. If the disk has no room for one more, the oldest is deleted before a save
    instead of after it; the newest is always kept."""
    max_failed_saves: int = at_least(1, 3)
    """Number of consecutive failed saves after which the run ends. A full disk is given at least ten seconds."""
    sample_prompt: str = "ROMEO"
    """Prompt of the text that is generated at the end of the run."""
    sample_tokens: int = at_least(0, 100)
    """Tokens of that text; 0: none is generated."""
    collective_timeout_seconds: int = between(1, _TIMEOUT, 300)
    """Seconds that a collective may wait before the run ends with an error."""
    start_timeout_seconds: int = between(1, _TIMEOUT, 1800)
    """Seconds that all ranks may take to find each other and to connect at the start of a run."""
    rendezvous_timeout_seconds: int = between(1, _TIMEOUT, 300)
    """Seconds that the nodes of a launch wait for each other before any of them starts a rank."""
    stop_seconds: int = between(1, _TIMEOUT, 300)
    """Seconds after SIGTERM or SIGUSR1 for the current step and a checkpoint; a run that needs longer is killed."""

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if self.attention_backend != "auto" and self.device == "cpu":
            hint = "is a GPU backend: set it to auto, or set training.device=cuda"
            yield Problem("attention_backend", self.attention_backend, hint, ("device",))
        yield from self._ramp_problems()
        if self.sample_tokens > 0 and not self.sample_prompt:
            hint = "must not be empty; to generate no sample, set training.sample_tokens=0"
            yield Problem("sample_prompt", self.sample_prompt, hint, ("sample_tokens",))
        yield from value_schedule_problems("mtp_loss_scaling_factor", self.mtp_loss_scaling_factor)
        yield from value_schedule_problems("router_bias_update_rate", self.router_bias_update_rate)

    def _ramp_problems(self) -> Iterator[Problem]:
        start, increment = self.rampup_start_batch_size, self.rampup_batch_size_increment
        if start is not None and start > self.global_batch_size:
            hint = f"must be at most global_batch_size = {self.global_batch_size}, or null"
            yield Problem("rampup_start_batch_size", start, hint, ("global_batch_size",))
        if start is not None and increment is not None and increment > 0:
            levels = ceil_div(self.global_batch_size - start, increment)
            if levels > _MOST_LEVELS:
                hint = f"gives {levels} batch sizes, more than {_MOST_LEVELS}; use a larger increment"
                yield Problem("rampup_batch_size_increment", increment, hint)
        for name, missing in (("rampup_batch_size_increment", None), ("rampup_tokens", 0)):
            if (self.__dict__[name] == missing) != (start is None):
                hint = (
                    "must be set together with rampup_start_batch_size: set all of rampup_start_batch_size, "
                    "rampup_batch_size_increment and rampup_tokens, or none (null, null and 0)"
                )
                yield Problem(name, self.__dict__[name], hint, ("rampup_start_batch_size",))


def _batches_in_words(sequences: int, share: int) -> str:
    return f"{sequences:,} sequences = {sequences // share:,} micro-batches"


NO_UNREADABLE_FIELDS = UnreadableFields()

# Fields that the checks between several values depend on.
_SHARE = ("topology.edp", "topology.ep", "schedule.micro_batch_size")
_STAGES = ("schedule.name", "schedule.chunks", "topology.pp")
_ATTENTION = ("model", "precision.compute", "training.sequence_length", "schedule.micro_batch_size")
_RAMP = (
    "training.rampup_start_batch_size",
    "training.rampup_batch_size_increment",
    "training.rampup_tokens",
    "training.global_batch_size",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of a run. Each field but `training` and `telemetry` is a group of files in `conf/`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    topology: Topology = field(default_factory=Topology)
    """Parallel sizes: pipeline, expert and data parallelism."""
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    """Token dispatcher (all-to-all) of the experts."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats of compute."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and the learning rate."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Pipeline schedule and micro-batches."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """Selective activation recomputation."""
    data: DataConfig
    """Corpus and tokenizer."""
    budget: BudgetConfig
    """Budget of the run in GPU-hours."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Hardware of the run."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length of training, batch size, evaluation and checkpoints."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Metrics, events and traces that the run writes."""

    @property
    def batch_ramp(self) -> BatchRamp:
        """Batch size of every optimizer step, in sequences."""
        training = self.training
        if training.rampup_start_batch_size is None or training.rampup_batch_size_increment is None:
            return BatchRamp.constant(training.global_batch_size)
        sizes = training.rampup_start_batch_size, training.rampup_batch_size_increment, training.global_batch_size
        return make_batch_ramp(*sizes, training.rampup_tokens, training.sequence_length)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.batch_ramp.steps_for_samples(ceil_div(self.training.tokens, self.training.sequence_length))

    def tokens_after(self, steps: int) -> int:
        """Return the input tokens that the first `steps` optimizer steps consume."""
        return self.batch_ramp.consumed_samples(steps) * self.training.sequence_length

    @property
    def tokens_per_sample(self) -> int:
        """W, tokens per sample, including the targets of the last input."""
        return self.training.sequence_length + 1 + self.model.num_nextn_predict_layers

    @property
    def global_micro_batch_size(self) -> int:
        """Sequences per micro-batch over all data-parallel ranks."""
        return self.topology.dp * self.schedule.micro_batch_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank in one step of `global_batch_size` sequences."""
        return self.training.global_batch_size // self.global_micro_batch_size

    @property
    def expert_block_rows(self) -> int:
        """Largest number of rows that the experts of one rank compute in one call; see `RecomputeConfig`."""
        return self.recompute.resolve_expert_block_rows(
            self.schedule.micro_batch_size * self.training.sequence_length * self.model.num_experts_per_tok
        )

    def attention_shape(self, dtype: torch.dtype) -> AttentionShape:
        """Return the shape of attention for one micro-batch on one rank, computed in `dtype`."""
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
        """Yield every problem of this configuration that can be found without disk or processes.

        `doubt` names fields whose values could not be read; problems that involve them are left out.
        """
        # An invalid value is replaced by its default, so that one pass also checks all other fields. A problem that
        # involves such a default is not the user's, and is dropped.
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
            assert isinstance(value, CheckedConfig)
            yield from (problem.with_prefix(part.name) for problem in value.problems())

    def _cross_problems(self) -> Iterator[Problem]:
        model, topology, training = self.model, self.topology, self.training
        if model.n_routed_experts % topology.ep:
            hint = (
                f"must divide model.n_routed_experts = {model.n_routed_experts}: every rank holds equally many experts"
            )
            yield Problem("topology.ep", topology.ep, hint, ("model.n_routed_experts",))
        share = self.global_micro_batch_size
        if training.global_batch_size % share:
            parts = f"edp x ep x micro_batch = {topology.edp} x {topology.ep} x {self.schedule.micro_batch_size}"
            nearest = max(1, round(training.global_batch_size / share)) * share
            hint = f"must be a multiple of {share} ({parts}); the nearest is {nearest}"
            yield Problem("training.global_batch_size", training.global_batch_size, hint, _SHARE)
        if self.precision.linear == "fp8" and RecomputeModule.GATE_UP in self.recompute.modules:
            hint = "gate_up saves no memory in FP8, which keeps the FP8 gate and up projections; remove gate_up"
            yield Problem("recompute.modules", self.recompute.modules, hint, ("precision.linear",))
        if training.attention_backend != "auto":
            case = self.attention_shape(self.precision.compute_dtype(torch.device("cuda")))
            for reason in unsupported_shape_reasons(training.attention_backend, case):
                yield Problem("training.attention_backend", training.attention_backend, reason, _ATTENTION)
        if training.global_batch_size > share * _MOST_MICRO_BATCHES:
            count = _batches_in_words(training.global_batch_size, share)
            hint = f"{count} per step, more than {_MOST_MICRO_BATCHES:,}; use more ranks or larger micro-batches"
            yield Problem("training.global_batch_size", training.global_batch_size, hint, _SHARE)
        else:
            yield from self._schedule_problems(share)
        yield from self._alignment_problems()
        yield from self._vocabulary_problems()

    def _vocabulary_problems(self) -> Iterator[Problem]:
        data, rows = self.data, self.model.vocab_size
        if data.vocab_size is not None and data.vocab_size > rows:
            hint = f"must be at most model.vocab_size = {rows}; model.vocab_size=null takes that of the tokenizer"
            yield Problem("data.vocab_size", data.vocab_size, hint, ("model.vocab_size",))
        if data.vocab_size is None and data.tokenizer is None and self.training.start_from is None:
            hint = "must be given to train a tokenizer, or name one: data.tokenizer"
            yield Problem("data.vocab_size", None, hint, ("data.tokenizer", "training.start_from"))

    def _schedule_problems(self, share: int) -> Iterator[Problem]:
        """Yield problems of schedule and stages; `share`: sequences per micro-batch over all data-parallel ranks."""
        schedule, ranks, layers = self.schedule, self.topology.pp, self.model.num_hidden_layers
        yield from self._ramp_problems(share)
        found = list(schedule_problems(schedule.name, ranks, self.num_micro_batches, schedule.chunks))
        for problem in found:
            if problem.field == "micro_batches" and self.training.global_batch_size % share:
                continue  # their number is not known yet
            if problem.field == "micro_batches":
                hint = f"{_batches_in_words(self.training.global_batch_size, share)}; {problem.hint}"
                yield Problem("training.global_batch_size", self.training.global_batch_size, hint, (*_STAGES, *_SHARE))
            else:
                field = {"ranks": "topology.pp", "chunks": "schedule.chunks"}[problem.field]
                yield Problem(field, problem.value, problem.hint, _STAGES)
        if any(problem.field != "micro_batches" for problem in found):
            return
        stages = build_placement(schedule.name, ranks, schedule.chunks).num_stages
        if stages > layers:
            hint = f"gives {stages} stages with {schedule.name}, more than the model's {layers} layers"
            yield Problem("topology.pp", ranks, hint, (*_STAGES, "model.num_hidden_layers"))
        elif schedule.layers_per_stage is not None:
            for problem in partition_problems(layers, stages, schedule.layers_per_stage):
                yield replace(problem.with_prefix("schedule"), related_fields=(*_STAGES, "model.num_hidden_layers"))

    def _ramp_problems(self, share: int) -> Iterator[Problem]:
        """Yield a problem for the first batch size of the ramp that the schedule cannot run."""
        for number, level in enumerate(self.batch_ramp.levels[:-1]):
            found = next(self._size_problems(level.batch_size, share, is_first=number == 0), None)
            if found is not None:
                yield found
                return

    def _size_problems(self, size: int, share: int, *, is_first: bool) -> Iterator[Problem]:
        """Yield why a step of `size` sequences cannot run, with the nearest size that can."""
        schedule, training = self.schedule, self.training
        name = "rampup_start_batch_size" if is_first else "rampup_batch_size_increment"
        field, value, judges = f"training.{name}", training.__dict__[name], (*_STAGES, *_SHARE, *_RAMP)
        when = "in the first step" if is_first else "later in the ramp"
        if size % share:
            gives = f"{when}, {size:,} sequences = {size / share:g} micro-batches"
            nearest = (
                nearest_valid_micro_batches(schedule.name, self.topology.pp, round(size / share), schedule.chunks)
                * share
            )
            yield Problem(field, value, f"{gives}; the nearest valid batch is {nearest}", judges)
            return
        for problem in schedule_problems(schedule.name, self.topology.pp, size // share, schedule.chunks):
            if problem.field == "micro_batches":
                yield Problem(field, value, f"{when}, {_batches_in_words(size, share)}; {problem.hint}", judges)

    def _alignment_problems(self) -> Iterator[Problem]:
        """Yield widths that grouped GEMMs cannot take: their rows must be multiples of 16 bytes, except in FP64."""
        if self.precision.compute == "float64" or self.model.num_moe_layers + self.model.num_nextn_predict_layers == 0:
            return
        step = 4 if self.precision.compute == "float32" else 8  # auto may become BF16
        moe_layers = ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers")
        judges = ("precision.compute", *(f"model.{name}" for name in moe_layers))
        for name in ("hidden_size", "moe_intermediate_size"):
            if (width := self.model.__dict__[name]) % step:
                hint = f"must be a multiple of {step}: rows of grouped GEMMs are multiples of 16 bytes"
                yield Problem(f"model.{name}", width, hint, judges)
