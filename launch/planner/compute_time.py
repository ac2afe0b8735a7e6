"""Seconds of computing: each operation takes the measured time of its shape and role, or of the most similar one.

Computing leaves the SMs reserved for communication free even when no exchange runs, and an exchange does not slow it:
in the public trace grids are 112 of 132 SMs throughout, and attn(W) takes 2,405 µs alone and 2,375 to 2,392 µs during
an exchange.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.model.config import ModelConfig
from .exchange_time import bytes_per_second, cluster_evidence_class
from .kernel_times import EvidenceCoverage, KernelMeasurement, KernelTable, read_kernel_table
from .operations import (
    AttentionCore,
    ComputeOperation,
    ComputePhase,
    Gemm,
    LayerWorkload,
    MemoryBoundKernel,
    memory_bound_kernel_bytes,
    phase_operations,
)
from .recipe import ForecastRecipe, GemmPrecision

_TILE = 128
"""Edge of a GEMM's output tile (DeepGEMM)."""

MEASURED_MODEL = ModelConfig(
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
"""Layer whose memory passes the tables measured, with 4,096 tokens."""


def cluster_kernel_table(cluster: ClusterConfig) -> KernelTable:
    """Read the kernel times of a cluster. Raises `ConfigError` if a figure that every price needs is missing."""
    if cluster.tables is None:
        hint = (
            f"{cluster.name} has no kernel times, so nothing can be priced; choose a cluster that has them, such as "
            "cluster=h800, or measure this machine with `shoestring calibrate`"
        )
        raise ConfigError([Problem("cluster.tables", None, hint)])
    raise_if_any(
        Problem(f"cluster.{name}", None, f"is not known for {cluster.name}; no price is possible without it")
        for name, value in (("peak_tflops", cluster.peak_tflops), ("memory_gb", cluster.memory_gb))
        if value is None
    )
    return read_kernel_table(cluster.tables)


def _recipe_mismatches(table: KernelTable, recipe: ForecastRecipe) -> Iterator[Problem]:
    """Yield a problem per value in which the recipe differs from the one a table of whole phases was measured with."""
    configured = recipe_by_config_key(recipe)
    for field_name, measured in table.measured_recipe.items():
        if configured[field_name] != measured:
            hint = f"{table.name} was measured with {measured}; use that, or calibrate with this value"
            yield Problem(field_name, configured[field_name], hint)


def recipe_by_config_key(recipe: ForecastRecipe) -> dict[str, str]:
    """Return the values that change the time of whole phases, by configuration key."""
    return {
        "precision": recipe.precision.value,
        "recompute": recipe.recompute_name,
        "exchange": recipe.exchange_name,
        "optimizer.moments": f"{recipe.moment_bytes} bytes per parameter",
    }


@dataclass(frozen=True)
class ComputeTimeModel:
    """Times of phases on one cluster with one recipe, cached."""

    cluster: ClusterConfig
    recipe: ForecastRecipe
    table: KernelTable
    coverage: EvidenceCoverage = field(default_factory=EvidenceCoverage)

    @staticmethod
    def from_cluster(cluster: ClusterConfig, recipe: ForecastRecipe) -> "ComputeTimeModel":
        """Build the model. Raises `ConfigError` if the cluster lacks a figure or was measured with another recipe."""
        table = cluster_kernel_table(cluster)
        problems = list(_recipe_mismatches(table, recipe))
        if recipe.precision is GemmPrecision.FP8 and cluster.peak_fp8_tflops is None:
            problems.append(Problem("precision.linear", "fp8", f"{cluster.name} has no FP8; use precision=bf16"))
        raise_if_any(problems)
        return ComputeTimeModel(
            cluster, recipe, table, EvidenceCoverage(strongest_evidence=cluster_evidence_class(cluster, "tables"))
        )

    @cached_property
    def phase_seconds(self) -> Callable[[LayerWorkload, ComputePhase], float]:
        """Function that returns the seconds of one phase of one layer, launch gaps included."""
        return cache(self._price)

    def _price(self, shape: LayerWorkload, phase: ComputePhase) -> float:
        measured = self.table.find_row("phase", phase.value, shape.table_name)
        if measured is not None:
            return self._counted(measured, measured.seconds)
        # A calibrated table times whole phases on this machine; it has no kernels from which another shape could be
        # composed.
        if self.table.measured_recipe:
            hint = f"has no {phase.value} of {shape.table_name}; calibrate with as many ranks and such a batch"
            raise ConfigError([Problem("cluster.tables", self.table.name, hint)])
        seconds = sum(map(self._seconds, phase_operations(shape, self.recipe, phase)))
        gaps = self._gap_row(phase)
        return seconds if gaps is None else seconds + self._counted(gaps, gaps.seconds)

    def gap_seconds(self, phase: ComputePhase) -> float:
        """Return the seconds of a phase in which no kernel runs: the gaps between launches."""
        row = self._gap_row(phase)
        return row.seconds if row is not None else 0.0

    def _gap_row(self, phase: ComputePhase) -> KernelMeasurement | None:
        """Return the row of a phase's launch gaps: a dense layer has those of attention."""
        part, direction = phase.value[:-3], phase.value[-2]
        return self.table.find_row("launch", "gaps", f"attn({direction})" if part == "dense" else phase.value)

    def _seconds(self, operation: ComputeOperation) -> float:
        if isinstance(operation, Gemm):
            return self._gemm(operation)
        if isinstance(operation, AttentionCore):
            return self._core(operation)
        return self._pass(operation)

    def _gemm(self, gemm: Gemm) -> float:
        kind, shape = ("grouped" if gemm.is_grouped else "gemm"), (gemm.tokens, gemm.in_features, gemm.out_features)
        # A GEMM that is not measured takes the share of peak that the most similar shape reaches, in its format or else
        # in another. Shapes differ: on H800 FP8 forward GEMMs of the trace reach 563 (512 inputs) to 1,068 TFLOPS
        # (16,384 inputs).
        formats = (p for p in (gemm.dtype, *GemmPrecision) if self.table.select(kind, gemm.role.value, p.value))
        dtype = next(formats, None)
        if dtype is None:
            hint = f"has no {gemm.role.value} GEMM; measure one"
            raise ConfigError([Problem("cluster.tables", self.table.name, hint)])
        found = self.table.nearest_row(kind, gemm.role.value, dtype.value, shape)
        assert found is not None
        row, is_hit = found
        if is_hit and dtype is gemm.dtype:
            return self._counted(row, gemm.flops / self._rate(row, dtype) * self._waves(gemm))
        share = self._rate(row, dtype) / self._peak(dtype)
        seconds = gemm.flops / (share * self._peak(gemm.dtype)) * self._waves(gemm)
        taken = f"{row.name} {row.tokens} x {row.inputs} x {row.outputs} {row.dtype}, {share:.0%} of peak"
        operation = f"{gemm.name} {gemm.role.value} {'x'.join(map(str, shape))} {gemm.dtype.value}"
        self.coverage.substituted_rows[operation] = taken
        self.coverage.add_seconds("assumed", seconds)
        return seconds

    def _rate(self, row: KernelMeasurement, dtype: GemmPrecision) -> float:
        """Return the FLOP/s of a measured GEMM."""
        if row.unit == "share":
            return row.value * self._peak(dtype)
        return 2.0 * row.tokens * row.inputs * row.outputs / row.seconds

    def _peak(self, dtype: GemmPrecision) -> float:
        cluster = self.cluster
        peak = cluster.peak_fp8_tflops if dtype is GemmPrecision.FP8 else cluster.peak_tflops
        assert peak is not None
        return peak * 1e12

    def _waves(self, gemm: Gemm) -> float:
        """Return the factor on a GEMM's time from other comm SMs than in the table: the ratio of its waves of tiles."""
        sms, measured = self.cluster.sm_count, self.table.reserved_sms
        if sms is None or measured is None or self.recipe.comm_sms == int(measured.value):
            return 1.0
        # An input gradient's tiles are tokens x inputs, a weight gradient's inputs x outputs.
        height, width = {
            "forward": (gemm.tokens, gemm.out_features),
            "input_gradient": (gemm.tokens, gemm.in_features),
            "weight_gradient": (gemm.in_features, gemm.out_features),
        }[gemm.role.value]
        # A GEMM takes whole waves: a last wave with one tile costs as much as a full one. 6 instead of 20 SMs for the
        # exchange free 14 of 132, but a GEMM gains only where a wave is saved.
        tiles = math.ceil(height / _TILE) * math.ceil(width / _TILE)
        waves = [math.ceil(tiles / (sms - reserved)) for reserved in (self.recipe.comm_sms, int(measured.value))]
        return waves[0] / waves[1]

    def _core(self, core: AttentionCore) -> float:
        rows = self.table.select_any_format("attention", core.role)
        if not rows:
            raise ConfigError([Problem("cluster.tables", self.table.name, f"has no attention core, {core.role}")])
        row = rows[0]
        if row.unit == "share":
            seconds = core.flops / (row.value * self._peak(GemmPrecision.BF16))
        else:
            length, widths = row.tokens, row.inputs + row.outputs
            if core.role == "backward":
                widths = 3 * row.inputs + 2 * row.outputs
            seconds = core.flops / (MEASURED_MODEL.num_attention_heads * widths * length**2) * row.seconds
        # Attention has many more blocks than SMs (32 x 128 in the trace), so its time is proportional to free SMs.
        sms, reserved = self.cluster.sm_count, self.table.reserved_sms
        if reserved is not None and sms is not None:
            seconds *= (sms - reserved.value) / (sms - self.recipe.comm_sms)
        return self._counted(row, seconds)

    def _pass(self, operation: MemoryBoundKernel) -> float:
        row = self.table.find_row("memory", operation.kind, operation.table_phase.value)
        if row is None:
            default = self.table.find_row("memory", "default", "any")
            if default is None:
                return 0.0  # the measured layer has no such pass in this phase
            rate = bytes_per_second(self.cluster, "memory", f"a {operation.kind} pass")
            return self._counted(default, operation.bytes / (default.value * rate))
        # Memory-bound: time is proportional to bytes, whichever share of the bandwidth the kernel reaches.
        shape = LayerWorkload(MEASURED_MODEL, row.tokens, 1, 1, traced_rows=row.inputs or None)
        least = memory_bound_kernel_bytes(shape, operation.kind, operation.table_phase)
        return self._counted(row, row.seconds * operation.bytes / least)

    def _counted(self, row: KernelMeasurement, seconds: float) -> float:
        """Count the seconds as evidence of the row's class, and return them."""
        self.coverage.add_seconds(row.evidence, seconds)
        return seconds
