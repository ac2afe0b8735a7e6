"""`shoestring calibrate`: measure the parts of a run on this machine, as a cluster for the planner."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...trainer.config import RunConfig
from ...trainer.costs.cluster import ClusterConfig
from ..answers.blocks import Answer, Paragraph, number, table
from ..answers.options import add_override_arguments
from ..bench.calibrate_rank import calibrate_rank
from ..compose import compose_run_config, escape_interpolations
from ..planner.compute_time import recipe_by_config_key
from ..planner.config_adapter import configured_recipe, unsupported_config_problems
from ..planner.kernel_times import KernelMeasurement, read_kernel_table, write_kernel_table
from ..run.on_ranks import run_on_ranks

_SECONDS = 600.0
_FOLDER = Path("runs/calibration")
_TABLE = "measured.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    text = f"output directory (default {_FOLDER})"
    parser.add_argument("--output", type=Path, default=_FOLDER, metavar="DIR", help=text)
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="number of processes (default 2)")
    text = "repetitions of each measurement (default 20)"
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help=text)


def answer(options: argparse.Namespace) -> Answer:
    """Measure, and return the times and how to use the cluster."""
    written = calibrate(options.overrides, options.config_dir, options.output, options.ranks, options.repeats)
    return calibration_answer(written, options.output)


def calibration_answer(written: Path, folder: Path) -> Answer:
    """Return the times in the table of the cluster `written` to `folder`, and how to use it."""
    measured = [row for row in read_kernel_table(str(folder.absolute() / _TABLE)).rows if row.unit]
    rows = [(row.kind, f"{row.name} {row.role}", number(row.value, ".4g"), row.unit) for row in measured]
    use = f"Wrote {written}. Use it with: --config-dir {folder} cluster=measured"
    data = {"cluster_file": str(written), "measurements": [asdict(row) for row in measured]}
    title = "Times measured on this machine"
    return Answer.from_blocks(title, data, [Paragraph(use), table(title, ("kind", "operation", "time", "unit"), rows)])


def calibrate(overrides: Sequence[str], config_dir: Path | None, folder: Path, ranks: int, repeats: int) -> Path:
    """Measure the model of the run that `overrides` describe on `ranks` processes; return the cluster's YAML file.

    Use it with `--config-dir FOLDER cluster=measured`. It measures the CPU; GPUs are priced with tables of their
    kernels. Raises `ConfigError` before a process starts, and `RanksFailed`.
    """
    config = compose_run_config(overrides, config_dir)
    raise_if_any(_problems(config, {"--ranks": ranks, "--repeats": repeats}))
    folder = folder.absolute()
    try:
        (folder / "cluster").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = f"cannot be created: {error.strerror}"
        raise ConfigError([Problem("--output", str(folder), hint)]) from None
    rows = run_on_ranks(calibrate_rank, (config, repeats), ranks, device="cpu", seconds=_SECONDS)[0]
    return write_cluster_config(folder, [*recipe_measurements(config), *rows], ranks)


def recipe_measurements(config: RunConfig) -> Iterator[KernelMeasurement]:
    """Yield the recipe that the phases were measured with; they are valid for no other."""
    for name, value in recipe_by_config_key(configured_recipe(_on_local_cpu(config))).items():
        yield KernelMeasurement("recipe", name, value, "any", 0, 0, 0, 0.0, "", "measured", "shoestring calibrate")


def _on_local_cpu(config: RunConfig) -> RunConfig:
    return replace(config, cluster=ClusterConfig())


def _problems(config: RunConfig, counts: Mapping[str, int]) -> Iterator[Problem]:
    """Yield `counts` of options below 1, and configured values that cannot be measured on the CPU."""
    yield from (Problem(option, count, "must be at least 1") for option, count in counts.items() if count < 1)
    gpus, device = torch.cuda.device_count(), config.training.device
    if device == "auto" and gpus:
        hint = f"calibrate measures the CPU, but the run would use this machine's {gpus} GPU(s); use cpu, or a "
        yield Problem("training.device", device, f"{hint}cluster with GPU kernel times, such as cluster=h800")
    if config.exchange.name == "deepep":
        yield Problem("exchange.name", "deepep", "is for GPUs, but calibrate measures the CPU; use flat or two_hop")
    yield from unsupported_config_problems(_on_local_cpu(config))


def write_cluster_config(folder: Path, rows: Sequence[KernelMeasurement], ranks: int) -> Path:
    """Write the kernel table and the YAML file of the measured cluster to `folder`, an absolute path that exists."""
    table, cluster = folder / _TABLE, folder / "cluster" / "measured.yaml"
    write_kernel_table(table, rows)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks / 1e9
    description = {
        "name": "measured",
        "peak_tflops": 1.0,
        "memory_gb": round(memory, 3),
        "nodes": 1,
        "gpus_per_node": ranks,
        "tables": str(table),
        "sources": {
            "peak_tflops": "assumed: 1, so that utilization reads as TFLOPS",
            "memory_gb": "measured: this machine's memory over its ranks",
            "nodes": "measured: this machine",
            "gpus_per_node": "measured: number of ranks",
            "tables": "measured: shoestring calibrate on this machine",
        },
    }
    text = OmegaConf.to_yaml(OmegaConf.create(escape_interpolations(description)))
    cluster.write_text(f"# Written by `shoestring calibrate`.\n{text}")
    return cluster
