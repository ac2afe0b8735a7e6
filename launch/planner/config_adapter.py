"""Conversion between run configurations and the planner's inputs: layout and recipe."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...comm.errors import Problem, raise_if_any
from ...comm.exchange.deepep import INTER_NODE_SMS
from ...trainer.config import RunConfig
from ...trainer.model.recompute import RecomputeModule
from ..compose import config_to_dict
from .compute_time import cluster_kernel_table
from .forecast import ParallelLayout
from .kernel_times import KernelTable
from .recipe import ForecastRecipe, GemmPrecision


def layout_from_config(config: RunConfig) -> ParallelLayout:
    """Return the layout that a configuration describes."""
    schedule = config.schedule
    return ParallelLayout(
        config.topology, schedule.name, schedule.micro_batch_size, schedule.chunks, schedule.layers_per_stage
    )


def recipe_from_config(config: RunConfig, inputs: Mapping[str, Any]) -> ForecastRecipe:
    """Return the recipe of a configured run; `inputs` are the fields that no configuration has (options).

    Raises `ConfigError` with every value that cannot be priced on the run's cluster.
    """
    table = cluster_kernel_table(config.cluster)
    recipe = replace(configured_recipe(config), **{"comm_sms": _default_comm_sms(config, table), **inputs})
    problems = [*unsupported_config_problems(config), *cluster_size_problems(config)]
    raise_if_any([*problems, *_input_problems(config, table, recipe, inputs)])
    return recipe


def configured_recipe(config: RunConfig) -> ForecastRecipe:
    """Return the recipe fields that the configuration sets."""
    return ForecastRecipe(
        precision=gemm_precision_from_config(config),
        recompute=config.recompute.recompute_modules,
        exchange=config.exchange,
        overlap=config.schedule.overlap,
        moment_bytes=2 * config.optimizer.moments_dtype(config.precision.parameter_dtype()).itemsize,
        averages_weights=config.optimizer.ema_decay is not None,
        expert_block_rows=config.recompute.expert_block_rows,
        on_cpu=runs_on_cpu(config),
    )


def gemm_precision_from_config(config: RunConfig) -> GemmPrecision:
    """Return the format of the Linears' GEMMs; `auto` is BF16 on GPUs and FP32 on a CPU."""
    if config.precision.linear == "fp8":
        return GemmPrecision.FP8
    device = torch.device("cpu" if runs_on_cpu(config) else "cuda")
    computes_in_bf16 = config.precision.compute_dtype(device) is torch.bfloat16
    return GemmPrecision.BF16 if computes_in_bf16 else GemmPrecision.FP32  # FP64 is refused


def runs_on_cpu(config: RunConfig) -> bool:
    """Return whether the cluster's "GPUs" are processes on a CPU."""
    return config.cluster.sm_count is None


def _default_comm_sms(config: RunConfig, table: KernelTable) -> int:
    """Return the SMs of the exchange: DeepEP's setting, else those of the table's measurement."""
    if table.reserved_sms is None:
        return 0
    # Kernel times are of the free SMs: 112 of 132 in the public trace, where 20 communicate (report §3.2.2).
    uses_deepep = config.exchange.name == "deepep" and config.topology.nodes_per_ep_group > 1
    return INTER_NODE_SMS if uses_deepep else int(table.reserved_sms.value)


def comm_sms_limit(config: RunConfig) -> int | None:
    """Return the SMs of a GPU; None if no time depends on them, as the table does not say how many communicated."""
    return None if cluster_kernel_table(config.cluster).reserved_sms is None else config.cluster.sm_count


def unsupported_config_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield configured values whose time no table gives."""
    cluster, precision = config.cluster, config.precision
    here = "cpu" if runs_on_cpu(config) else "cuda"
    if config.training.device not in ("auto", here):
        hint = f"{cluster.name} is priced on its {'CPU' if here == 'cpu' else 'GPUs'}; use auto or {here}"
        yield Problem("training.device", config.training.device, hint)
    if precision.compute == "float64":
        yield Problem("precision.compute", "float64", "no table has FP64 times; use precision=bf16 or precision=fp32")
    elif precision.compute == "float32" and not runs_on_cpu(config):
        hint = f"no table has FP32 times on {cluster.name}; use precision=bf16 or precision=fp8"
        yield Problem("precision.compute", "float32", hint)
    if precision.linear == "fp8" and runs_on_cpu(config):
        hint = "a CPU emulates FP8, and no table has times of that; use precision=auto, or a cluster of GPUs"
        yield Problem("precision.linear", "fp8", hint)
    if precision.fp8_backend == "reference" and not runs_on_cpu(config):
        hint = "no table has times of the emulation on a GPU; use precision.fp8_backend=auto"
        yield Problem("precision.fp8_backend", "reference", hint)
    if config.exchange.check_order:
        hint = "no table has times of the check before each exchange; use false"
        yield Problem("exchange.check_order", True, hint)


def cluster_size_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield differences between the cluster's GPUs and the ranks of the topology."""
    topology, cluster = config.topology, config.cluster
    ranks, gpus, per_node = topology.world_size, cluster.total_gpus, cluster.gpus_per_node
    if ranks != gpus:
        fit = f"cluster.nodes={ranks // per_node}" if ranks % per_node == 0 else f"cluster.gpus_per_node={ranks}"
        grid = f"pp x edp x ep = {topology.pp} x {topology.edp} x {topology.ep} = {ranks}"
        has = f"with {per_node} GPUs each are {gpus} GPUs, but the topology has {grid} ranks"
        yield Problem("cluster.nodes", cluster.nodes, f"{has}; use a topology of {gpus} ranks, or {fit}")
    elif min(topology.gpus_per_node, ranks) != min(per_node, ranks):
        hint = f"{cluster.name} has {per_node} per node; use topology.gpus_per_node={per_node}"
        yield Problem("topology.gpus_per_node", topology.gpus_per_node, hint)


def _input_problems(
    config: RunConfig, table: KernelTable, recipe: ForecastRecipe, inputs: Mapping[str, Any]
) -> Iterator[Problem]:
    sms = comm_sms_limit(config)
    yield from recipe.problems(sms, config.topology.ep)
    if "comm_sms" in inputs and sms is None:
        hint = f"no time in the table of {config.cluster.name} depends on SMs reserved for communication"
        yield Problem("--comm-sms", recipe.comm_sms, f"{hint}; leave it out")
    if recipe.skew > 0 and table.measured_recipe:
        hint = f"{config.cluster.name} was measured in whole phases with balanced experts; leave it out"
        yield Problem("--skew", recipe.skew, hint)


def config_with_layout(config: RunConfig, layout: ParallelLayout, recipe: ForecastRecipe) -> RunConfig:
    """Return the run in another layout, with the recipe's precision and recompute modules."""
    names = {"name": layout.schedule, "micro_batch_size": layout.micro_batch_size, "chunks": layout.chunks_per_rank}
    precision = config.precision
    if recipe.precision is GemmPrecision.FP8:
        precision = replace(precision, linear="fp8")
    elif precision.linear == "fp8":
        precision = replace(precision, linear="native", fp8_backend="auto", fp8_scale_format="fp32")
    return replace(
        config,
        topology=layout.topology,
        schedule=replace(config.schedule, **names, layers_per_stage=layout.layers_per_stage),  # type: ignore[arg-type]
        recompute=replace(
            config.recompute, modules=tuple(part.value for part in RecomputeModule if part in recipe.recompute)
        ),
        precision=precision,
    )


def diff_overrides(before: RunConfig, after: RunConfig) -> list[str]:
    """Return the overrides that turn the configuration `before` into `after`."""
    return list(_differences(config_to_dict(before), config_to_dict(after), ""))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before[key], dict) and prefix.count(".") == 0:
            yield from _differences(before[key], value, f"{prefix}{key}.")
        elif value != before[key]:
            yield f"{prefix}{key}={_written(value)}"


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
