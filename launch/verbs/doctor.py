"""`shoestring doctor`: which implementation runs each operation on this machine, and why others cannot."""

import argparse
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...comm.exchange.deepep import missing_deepep_requirements
from ...comm.groups import P2P_MAX_CTAS, REDUCE_MAX_CTAS
from ...parallelism.weight_grad import missing_apex_requirements
from ...trainer.model.attention_backend import (
    CPU_ATTENTION,
    GPU_BACKENDS,
    AttentionShape,
    GpuCapabilities,
    select_attention,
    unsupported_gpu_reasons,
    unsupported_shape_reasons,
)
from ...trainer.precision.backend import BACKEND_NAMES, choose_backend, unavailable_reasons
from ..answers.blocks import Answer, Block, Paragraph, records_table
from ..cluster.simulated_cluster import namespace_problems
from ..run.rank_environment import (
    NUMA_BINDING_FLAG,
    NumaSupport,
    applicable_settings,
    build_rank_environment,
    environment_settings,
    numa_binding_blocker,
    single_node_settings,
)

NOT_RUN_ON_HARDWARE = "not yet run on hardware"
AUTO_FP8_NOTE = "selected by precision.fp8_backend=auto"
AUTO_ATTENTION_NOTE = "selected by training.attention_backend=auto for DeepSeek-V3"
DEEPSEEK_V3_ATTENTION = AttentionShape(
    batch=1, heads=128, sequence_length=4096, qk_head_dim=192, v_head_dim=128, dtype=torch.bfloat16
)
"""Attention shape of DeepSeek-V3."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option: the verb has only those of every answer."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of one operation."""

    operation: str
    implementation: str
    available: bool
    """True if it works on this machine."""
    note: str
    """Description, and what is missing."""


def list_implementations() -> tuple[Implementation, ...]:
    """List all implementations by operation, in the order of the table."""
    return (*_devices(), *_exchanges(), *_products(), *_fp8(), _rehearsal())


def _on_gpu(operation: str, implementation: str, missing: Iterable[str], *notes: str) -> Implementation:
    """Return an implementation for GPUs; none of them has run on hardware."""
    lacks = [*missing]
    return Implementation(operation, implementation, not lacks, "; ".join([*notes, *lacks, NOT_RUN_ON_HARDWARE]))


def _devices() -> Iterator[Implementation]:
    gpus = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)}))
    found = f"{gpus} x {names}; {NOT_RUN_ON_HARDWARE}" if gpus else "torch finds none"
    yield Implementation("compute", "GPU (training.device=cuda)", gpus > 0, found)
    yield Implementation("compute", "CPU (training.device=cpu)", True, f"{os.cpu_count()} cores, {platform.machine()}")
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    note = NOT_RUN_ON_HARDWARE if nccl else "needs a GPU and a build of torch with NCCL"
    yield Implementation("collectives", "NCCL", nccl, note)
    yield Implementation("collectives", "gloo", dist.is_gloo_available(), "for CPU ranks")


def _exchanges() -> Iterator[Implementation]:
    on_gpu = f"; on a GPU {NOT_RUN_ON_HARDWARE}"
    yield Implementation("token dispatcher", "flat", True, f"reference all-to-all{on_gpu}")
    once = "each token is sent to a node at most once, then forwarded inside it; BF16 and FP8 on the wire"
    yield Implementation("token dispatcher", "two_hop", True, f"{once}{on_gpu}")
    yield _on_gpu("token dispatcher", "deepep", missing_deepep_requirements("auto", 1, build_rank_environment()))


def _products() -> Iterator[Implementation]:
    yield Implementation("expert GEMM", "F.grouped_mm", True, "FP32 and BF16; FP64 runs one expert after the other")
    yield from _attention()
    missing = missing_apex_requirements(on_gpu=torch.cuda.is_available())
    note = "BF16 Linears: one GEMM that accumulates in FP32"
    yield _on_gpu("weight gradients", "Apex's wgrad_gemm_accum_fp32", missing, note)
    yield Implementation("weight gradients", "GEMM, then addition", True, "for experts, and without Apex")
    note = "FP32 arithmetic, BF16 moments; sharded over replicas (ZeRO-1)"
    yield Implementation("optimizer", "torch's fused AdamW", True, note)


def _attention() -> Iterator[Implementation]:
    """Yield each backend for DeepSeek-V3's BF16 shape; `training.attention_backend=auto` selects the first usable."""
    note = f"{CPU_ATTENTION.description}; trainer/model/cpu_attention.py"
    yield Implementation("attention", CPU_ATTENTION.name, True, note)
    gpu = GpuCapabilities.detect() if torch.cuda.is_available() else None
    taken = None if gpu is None else select_attention("auto", DEEPSEEK_V3_ATTENTION, gpu).name
    for backend in GPU_BACKENDS.values():
        missing = [*unsupported_shape_reasons(backend.name, DEEPSEEK_V3_ATTENTION)]
        missing += (
            ["it needs a GPU"] if gpu is None else unsupported_gpu_reasons(backend.name, DEEPSEEK_V3_ATTENTION, gpu)
        )
        auto = [AUTO_ATTENTION_NOTE] * (backend.name == taken)
        yield _on_gpu("attention", backend.name, missing, *auto, backend.description)


def _fp8() -> Iterator[Implementation]:
    descriptions = {
        "triton": "Shoestring's kernels",
        "torch": "scaled_mm of cuBLASLt, one expert after the other",
        "te": "Transformer Engine's block-scaled GEMM, one expert after the other",
    }
    on_gpu = torch.cuda.is_available()
    taken = choose_backend("auto", on_gpu=on_gpu)
    for backend in BACKEND_NAMES:
        auto = [AUTO_FP8_NOTE] * (backend == taken)
        if backend == "reference":
            note = f"reference implementation, exact sums of 128 products; on a GPU {NOT_RUN_ON_HARDWARE}"
            yield Implementation("FP8 GEMM", backend, True, "; ".join([*auto, note]))
            continue
        yield _on_gpu("FP8 GEMM", backend, unavailable_reasons(backend, on_gpu=on_gpu), *auto, descriptions[backend])


def _rehearsal() -> Implementation:
    problems = list(namespace_problems())
    note = "; ".join(f"{problem.field}: {problem.hint}" for problem in problems) or "network namespaces"
    return Implementation("simulated cluster", "ip, tc", not problems, note)


_NO_GPU = "not set: for GPUs"


@dataclass(frozen=True)
class EffectiveSetting:
    """Setting that a run started on this machine would have."""

    name: str
    value: str
    set_by: str
    """Origin of the value: `shoestring`, `environment`, or why it is not set."""
    reason: str


def effective_settings(environment: Mapping[str, str]) -> Iterator[EffectiveSetting]:
    """Yield every setting of ranks: environment variables, options of NCCL groups, NUMA binding, torch's switches."""
    on_gpu = torch.cuda.device_count() > 0
    origin = "shoestring" if on_gpu else _NO_GPU
    run_dir = Path("RUN_DIR")
    local = single_node_settings()
    made = {setting.name for setting in applicable_settings(run_dir, on_gpu=on_gpu)}
    made |= {setting.name for setting in local if on_gpu or not setting.gpu_only}
    unset = "not set: CUDA is too old" if on_gpu else _NO_GPU
    for setting in (*environment_settings(run_dir), *local):
        reason, users = f"{setting.read_by}: {setting.reason}", setting.user_value(environment)
        value = setting.value.replace(f"{Path.cwd()}/", "")
        if users is None:
            set_by = "shoestring" if setting.name in made else unset
        elif users == (setting.name, setting.value):
            set_by = "environment, same as shoestring"
        else:
            set_by = f"environment; shoestring: {setting.name}={value}"
        yield EffectiveSetting(*(users or (setting.name, value)), set_by, reason)
    sms = "most thread blocks of NCCL, an option of the group:"
    why = f"{sms} a receive occupies its SMs while it waits"
    yield EffectiveSetting("max_ctas of P2P groups", str(P2P_MAX_CTAS), origin, why)
    yield EffectiveSetting("max_ctas of gradient groups", str(REDUCE_MAX_CTAS), origin, f"{sms} it overlaps GEMMs")
    not_bound = numa_binding_blocker(NumaSupport.detect(), on_gpu=on_gpu)
    set_by = "shoestring" if not_bound is None else f"not set: {not_bound}"
    yield EffectiveSetting("torchrun", NUMA_BINDING_FLAG, set_by, "kernel launches from a distant NUMA node are slower")
    why = "torch.backends.cuda.matmul: split GEMMs would sum their parts in BF16"
    yield EffectiveSetting("allow_bf16_reduced_precision_reduction", "False", origin, why)


def answer(options: argparse.Namespace) -> Answer:
    """Return the implementations and settings of this machine."""
    found = list_implementations()
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "implementations": [asdict(each) for each in found],
        "settings": [asdict(setting) for setting in effective_settings(os.environ)],
    }
    available = f"{sum(each.available for each in found)} of {len(found)} implementations are available here"
    implementation_headings = {name: name for name in ("operation", "implementation", "available", "note")}
    setting_headings = {"name": "setting", "value": "value", "set_by": "set by", "reason": "reason"}
    advice = "`python benchmarks/bring_up.py` runs each of them and reports which work."
    title = "Which implementation runs each operation on this machine"
    blocks: list[Block] = [
        Paragraph(f"{available}, with Python {data['python']} and torch {data['torch']}."),
        records_table(title, implementation_headings, data["implementations"], note=advice),
        records_table("Settings of ranks on this machine", setting_headings, data["settings"]),
    ]
    return Answer.from_blocks("Implementations on this machine", data, blocks)
