"""Seconds of computing: every operation from a measured row of its shape and role, or from the most similar one.

Computing leaves the lent SMs free whether an exchange runs or not, and takes no longer beside one: in the public trace
grids are 112 of 132 SMs throughout, and attn(W) takes 2,405 µs alone and 2,375 to 2,392 beside an exchange.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...comm.errors import ConfigError, Problem, refuse_if_any
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.model.config import ModelConfig
from .exchange_time import bytes_a_second, evidence_of
from .kernel_times import Coverage, KernelTable, Measurement, read_table
from .operations import ComputePhase, Core, Gemm, MemoryPass, Operation, Shape, pass_bytes, phase_operations
from .recipe import Precision, Recipe

_TILE = 128
"""Edge of the blocks that a GEMM is cut into (DeepGEMM)."""

MEASURED_ON = ModelConfig(
    name="deepseek_v3",
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
)
"""The layer whose passes over memory the tables measured, with 4,096 tokens."""


def described_table(cluster: ClusterConfig) -> KernelTable:
    """The kernel times of a cluster. Raises `ConfigError` where it does not say what every price needs."""
    if cluster.tables is None:
        hint = (
            f"{cluster.name} has no kernel times, and nothing can be priced without; write a cluster that has some, as "
            "cluster=h800, or measure this machine with `shoestring calibrate`"
        )
        raise ConfigError([Problem("cluster.tables", None, hint)])
    refuse_if_any(
        Problem(f"cluster.{name}", None, f"is not known for {cluster.name}, and nothing can be priced without it")
        for name, value in (("peak_tflops", cluster.peak_tflops), ("memory_gb", cluster.memory_gb))
        if value is None
    )
    return read_table(cluster.tables)


def _foreign(table: KernelTable, recipe: Recipe) -> Iterator[Problem]:
    """Where phases were timed whole, they are those of one recipe, and say nothing about another."""
    own = recipe_names(recipe)
    for field_name, measured in table.measured_with.items():
        if own[field_name] != measured:
            hint = f"{table.name} was measured with {measured}; write that, or calibrate with this"
            yield Problem(field_name, own[field_name], hint)


def recipe_names(recipe: Recipe) -> dict[str, str]:
    """What changes the time of whole phases, by the key that says so in a configuration."""
    return {
        "precision": recipe.precision.value,
        "recompute": recipe.recompute_name,
        "exchange": recipe.exchange_name,
        "optimizer.moments": f"{recipe.moment_bytes} bytes a parameter",
    }


@dataclass(frozen=True)
class Compute:
    """Prices phases on one cluster with one recipe. Keeps what it has priced."""

    cluster: ClusterConfig
    recipe: Recipe
    table: KernelTable
    coverage: Coverage = field(default_factory=Coverage)
    _priced: dict[tuple[Shape, ComputePhase], float] = field(default_factory=dict)

    @staticmethod
    def of(cluster: ClusterConfig, recipe: Recipe) -> Compute:
        """Raises `ConfigError` where the cluster does not say enough, or was measured with another recipe."""
        table = described_table(cluster)
        problems = list(_foreign(table, recipe))
        if recipe.precision is Precision.FP8 and cluster.peak_fp8_tflops is None:
            problems.append(Problem("precision.linear", "fp8", f"{cluster.name} has no FP8; write precision=bf16"))
        refuse_if_any(problems)
        return Compute(cluster, recipe, table, Coverage(at_best=evidence_of(cluster, "tables")))

    def phase(self, shape: Shape, phase: ComputePhase) -> float:
        """Seconds of one phase of one layer, gaps between its kernels included."""
        key = shape, phase
        if key not in self._priced:
            measured = self.table.find("phase", phase.value, _shape_name(shape))
            if measured is None and self.table.measured_with:
                hint = f"has no {phase.value} of {_shape_name(shape)}; calibrate with as many ranks and such a batch"
                raise ConfigError([Problem("cluster.tables", self.table.name, hint)])
            if measured is not None:
                self._count(measured, measured.seconds)
                self._priced[key] = measured.seconds
            else:
                self._priced[key] = sum(map(self._seconds, phase_operations(shape, self.recipe, phase)))
                self._priced[key] += self._gaps(phase)
        return self._priced[key]

    def gaps(self, phase: ComputePhase) -> float:
        """Of these, what passes between kernels: the processors are idle."""
        row = self.table.find("launch", "gaps", _like(phase))
        return row.seconds if row is not None else 0.0

    def _gaps(self, phase: ComputePhase) -> float:
        row = self.table.find("launch", "gaps", _like(phase))
        if row is None:
            return 0.0
        self._count(row, row.seconds)
        return row.seconds

    def _seconds(self, operation: Operation) -> float:
        if isinstance(operation, Gemm):
            return self._gemm(operation)
        if isinstance(operation, Core):
            return self._core(operation)
        return self._pass(operation)

    def _gemm(self, gemm: Gemm) -> float:
        kind, shape = ("grouped" if gemm.grouped else "gemm"), (gemm.tokens, gemm.inputs, gemm.outputs)
        found = self.table.nearest(kind, gemm.role.value, gemm.dtype.value, shape)
        if found is not None and found[1]:
            row = found[0]
            seconds = gemm.flops / self._rate(row, gemm.dtype) * self._waves(gemm)
            self._count(row, seconds)
            return seconds
        # Not measured: the share of peak that the most similar shape reaches, of this format or of another.
        formats = (p for p in (gemm.dtype, *Precision) if self.table.of(kind, gemm.role.value, p.value))
        dtype = next(formats, None)
        if dtype is None:
            hint = f"has no {gemm.role.value} GEMM at all; measure one"
            raise ConfigError([Problem("cluster.tables", self.table.name, hint)])
        found = self.table.nearest(kind, gemm.role.value, dtype.value, shape)
        assert found is not None
        row = found[0]
        share = self._rate(row, dtype) / self._peak(dtype)
        seconds = gemm.flops / (share * self._peak(gemm.dtype)) * self._waves(gemm)
        taken = f"{row.name} {row.tokens} x {row.inputs} x {row.outputs} {row.dtype}, {share:.0%} of peak"
        self._miss(f"{gemm.name} {gemm.role.value} {'x'.join(map(str, shape))} {gemm.dtype.value}", taken, seconds)
        return seconds

    def _rate(self, row: Measurement, dtype: Precision) -> float:
        """FLOPs a second of a measured GEMM."""
        if row.unit == "share":
            return row.value * self._peak(dtype)
        return 2.0 * row.tokens * row.inputs * row.outputs / row.seconds

    def _peak(self, dtype: Precision) -> float:
        cluster = self.cluster
        peak = cluster.peak_fp8_tflops if dtype is Precision.FP8 else cluster.peak_tflops
        assert peak is not None
        return peak * 1e12

    def _waves(self, gemm: Gemm) -> float:
        """By how much more or fewer lent SMs than in the table change a GEMM: whole waves of tiles."""
        sms, measured = self.cluster.sms, self.table.find("gemm", "lent_sms", "any")
        if sms is None or measured is None or self.recipe.comm_sms == int(measured.value):
            return 1.0
        # An input gradient's tiles are tokens x inputs, a weight gradient's inputs x outputs.
        height, width = {
            "forward": (gemm.tokens, gemm.outputs),
            "input_gradient": (gemm.tokens, gemm.inputs),
            "weight_gradient": (gemm.inputs, gemm.outputs),
        }[gemm.role.value]
        tiles = math.ceil(height / _TILE) * math.ceil(width / _TILE)
        waves = [math.ceil(tiles / (sms - lent)) for lent in (self.recipe.comm_sms, int(measured.value))]
        return waves[0] / waves[1]

    def _core(self, core: Core) -> float:
        rows = [row for precision in Precision for row in self.table.of("attention", core.role, precision.value)]
        if not rows:
            raise ConfigError([Problem("cluster.tables", self.table.name, f"has no attention core, {core.role}")])
        row = rows[0]
        if row.unit == "share":
            seconds = core.flops / (row.value * self._peak(Precision.BF16))
        else:
            length, widths = row.tokens, row.inputs + row.outputs
            if core.role == "backward":
                widths = 3 * row.inputs + 2 * row.outputs
            seconds = core.flops / (MEASURED_ON.num_attention_heads * widths * length**2) * row.seconds
        lent = self.table.find("gemm", "lent_sms", "any")
        if lent is not None and self.cluster.sms is not None:
            seconds *= (self.cluster.sms - lent.value) / (self.cluster.sms - self.recipe.comm_sms)
        self._count(row, seconds)
        return seconds

    def _pass(self, operation: MemoryPass) -> float:
        row = self.table.find("memory", operation.kind, operation.phase.value)
        if row is None:
            default = self.table.find("memory", "default", "any")
            if default is None:
                return 0.0  # this phase has no such pass in the measured layer
            rate = bytes_a_second(self.cluster, "memory_gbps", self.cluster.memory_gbps, f"a {operation.kind} pass")
            seconds = operation.bytes / (default.value * rate)
            self._count(default, seconds)
            return seconds
        shape = Shape(MEASURED_ON, row.tokens, 1, 1, received=row.inputs or None)
        seconds = row.seconds * operation.bytes / pass_bytes(shape, operation.kind, operation.phase)
        self._count(row, seconds)
        return seconds

    def _count(self, row: Measurement, seconds: float) -> None:
        self.coverage.add(row.evidence, seconds)

    def _miss(self, operation: str, taken: str, seconds: float) -> None:
        self.coverage.add("assumed", seconds)
        self.coverage.misses[operation] = taken


def _like(phase: ComputePhase) -> str:
    """Phases without gaps of their own have those of the phase that is most alike."""
    part, way = phase.value[:-3], phase.value[-2]
    return f"attn({way})" if part == "dense" else phase.value


def _shape_name(shape: Shape) -> str:
    """How a table of whole phases names the shape."""
    return f"{shape.micro_batch}x{shape.sequence_length}/{shape.expert_ranks}"
