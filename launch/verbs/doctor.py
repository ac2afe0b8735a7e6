"""`shoestring doctor`: what serves each operation on this machine, what could not and why, and what was never run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ...comm.exchange.deepep import missing_deepep_requirements
from ...comm.groups import P2P_MAX_CTAS, REDUCE_MAX_CTAS
from ...parallelism.weight_grad import missing_apex_requirements
from ...trainer.model.attention_backend import (
    CPU_BACKEND,
    GPU_BACKENDS,
    AttentionShape,
    GpuCapabilities,
    select_attention,
    unsupported_gpu_reasons,
    unsupported_shape_reasons,
)
from ...trainer.precision.backend import BACKEND_NAMES, choose_backend, unavailable_reasons
from ..cluster.namespaces import namespace_problems
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
AUTO_PROVIDER_NOTE = "what precision.fp8_backend=auto takes"
AUTO_ATTENTION_NOTE = "what training.attention_backend=auto takes for DeepSeek-V3"
DEEPSEEK_V3_ATTENTION = AttentionShape(
    batch=1, heads=128, sequence_length=4096, qk_head_dim=192, v_head_dim=128, dtype=torch.bfloat16
)
"""The attention of DeepSeek-V3."""


@dataclass(frozen=True)
class Implementation:
    """One way to serve one operation."""

    operation: str
    provider: str
    usable: bool
    """Here, now."""
    note: str
    """Why, or why not."""


def list_implementations() -> tuple[Implementation, ...]:
    """Everything that Shoestring chooses between, in the order of the report's sections."""
    return (*_devices(), *_exchanges(), *_products(), *_fp8(), *_rehearsal())


def _devices() -> Iterator[Implementation]:
    gpus = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)}))
    found = f"{gpus} of them: {names}; {NOT_RUN_ON_HARDWARE}" if gpus else "torch sees none"
    yield Implementation("compute", "GPU (training.device=cuda)", gpus > 0, found)
    yield Implementation("compute", "CPU (training.device=cpu)", True, f"{os.cpu_count()} cores, {platform.machine()}")
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    yield Implementation(
        "collectives", "NCCL", nccl, NOT_RUN_ON_HARDWARE if nccl else "needs a GPU and a build of torch with NCCL"
    )
    yield Implementation("collectives", "gloo", dist.is_gloo_available(), "what CPU ranks use")


def _exchanges() -> Iterator[Implementation]:
    on_gpu = f"; on a GPU {NOT_RUN_ON_HARDWARE}"
    yield Implementation("token exchange", "flat", True, f"all-to-all, a row an expert: the oracle{on_gpu}")
    yield Implementation(
        "token exchange", "two_hop", True, f"once a node, then inside it; BF16 and FP8 on the wire{on_gpu}"
    )
    missing = list(missing_deepep_requirements("auto", 1, build_rank_environment()))
    note = f"{'; '.join(missing)}; {NOT_RUN_ON_HARDWARE}" if missing else NOT_RUN_ON_HARDWARE
    yield Implementation("token exchange", "deepep", not missing, note)


def _products() -> Iterator[Implementation]:
    yield Implementation("expert products", "F.grouped_mm", True, "FP32 and BF16; FP64 runs an expert at a time")
    yield from _attention()
    missing = list(missing_apex_requirements(on_gpu=torch.cuda.is_available()))
    note = "; ".join(["BF16 products of Linears, added in FP32 by one GEMM", *missing, NOT_RUN_ON_HARDWARE])
    yield Implementation("weight gradients", "Apex's wgrad_gemm_accum_fp32", not missing, note)
    yield Implementation(
        "weight gradients", "a product, then a sum", True, "where Apex does not serve, and for experts"
    )
    note = "FP32 arithmetic, moments in BF16; sharded over replicas (ZeRO-1)"
    yield Implementation("optimizer", "torch's fused AdamW", True, note)


def _attention() -> Iterator[Implementation]:
    """Each backend for DeepSeek-V3's heads and length in BF16; `training.attention_backend=auto` takes the first of them."""
    yield Implementation(
        "attention",
        CPU_BACKEND.name,
        True,
        f"{CPU_BACKEND.description}; trainer/model/cpu_attention.py",
    )
    on_gpu = torch.cuda.is_available()
    gpu = GpuCapabilities.detect() if on_gpu else None
    for backend in GPU_BACKENDS.values():
        missing = [*unsupported_shape_reasons(backend.name, DEEPSEEK_V3_ATTENTION)]
        missing += (
            ["it needs a GPU"] if gpu is None else unsupported_gpu_reasons(backend.name, DEEPSEEK_V3_ATTENTION, gpu)
        )
        note = "; ".join([backend.description, *missing, NOT_RUN_ON_HARDWARE])
        if gpu is not None and select_attention("auto", DEEPSEEK_V3_ATTENTION, gpu).backend is backend:
            note = f"{AUTO_ATTENTION_NOTE}; {note}"
        yield Implementation("attention", backend.name, not missing, note)


def _fp8() -> Iterator[Implementation]:
    what = {
        "triton": "our kernels",
        "torch": "scaled_mm of cuBLASLt, an expert at a time",
        "te": "Transformer Engine's block-scaled GEMM, an expert at a time",
    }
    on_gpu = torch.cuda.is_available()
    taken = choose_backend("auto", on_gpu=on_gpu)
    for provider in BACKEND_NAMES:
        missing = list(unavailable_reasons(provider, on_gpu=on_gpu))
        if provider == "reference":
            note = f"the definition, exact sums of 128 products; on a GPU {NOT_RUN_ON_HARDWARE}"
        else:
            note = "; ".join([what[provider], *missing, NOT_RUN_ON_HARDWARE])
        if provider == taken:
            note = f"{AUTO_PROVIDER_NOTE}; {note}"
        yield Implementation("FP8 products", provider, not missing, note)


def _rehearsal() -> Iterator[Implementation]:
    problems = list(namespace_problems())
    note = "; ".join(f"{problem.field}: {problem.hint}" for problem in problems) or "network namespaces"
    yield Implementation("simulated cluster", "ip, tc", not problems, note)


_NO_GPU = "not made here: for GPUs"


@dataclass(frozen=True)
class EffectiveSetting:
    """A setting as a run that starts here and now would have it."""

    name: str
    value: str
    whose: str
    """Ours, yours (from the environment), or why it is not made."""
    why: str


def effective_settings(environment: Mapping[str, str]) -> Iterator[EffectiveSetting]:
    """Every setting of ranks: variables, the options of NCCL's groups, NUMA binding, and torch's switches."""
    on_gpu = torch.cuda.device_count() > 0
    here = "ours" if on_gpu else _NO_GPU
    run_dir = Path("RUN_DIR")
    local = single_node_settings()
    made = {setting.name for setting in applicable_settings(run_dir, on_gpu=on_gpu)}
    made |= {setting.name for setting in local if on_gpu or not setting.gpu_only}
    for setting in (*environment_settings(run_dir), *local):
        why, users = f"{setting.read_by}: {setting.reason}", setting.user_value(environment)
        value = setting.value.replace(f"{Path.cwd()}/", "")
        if users is not None:
            same = (
                "yours, as ours" if users == (setting.name, setting.value) else f"yours; ours: {setting.name}={value}"
            )
            yield EffectiveSetting(users[0], users[1], same, why)
        elif setting.name in made:
            yield EffectiveSetting(setting.name, value, "ours", why)
        else:
            yield EffectiveSetting(setting.name, value, "not made here: CUDA is too old" if on_gpu else _NO_GPU, why)
    sms = "thread blocks that NCCL may use, an option of the group:"
    yield EffectiveSetting(
        "max_ctas of P2P groups", str(P2P_MAX_CTAS), here, f"{sms} a receive holds its SMs while it waits"
    )
    yield EffectiveSetting("max_ctas of gradient groups", str(REDUCE_MAX_CTAS), here, f"{sms} it runs beside products")
    not_bound = numa_binding_blocker(NumaSupport.detect(), on_gpu=on_gpu)
    whose = "ours" if not_bound is None else f"not made here: {not_bound}"
    yield EffectiveSetting("torchrun", NUMA_BINDING_FLAG, whose, "Python far from its GPU launches more slowly")
    name = "allow_bf16_reduced_precision_reduction"
    yield EffectiveSetting(
        name, "False", here, "torch.backends.cuda.matmul: split products would add their parts in BF16"
    )


def doctor_as_dict() -> dict[str, object]:
    """The findings as plain values."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "findings": [asdict(finding) for finding in list_implementations()],
        "settings": [asdict(setting) for setting in effective_settings(os.environ)],
    }


def doctor_table() -> RenderableType:
    """The same for a reader."""
    table = Table(title="What serves what, here", title_justify="left")
    for heading in ("operation", "provider", "here", "note"):
        table.add_column(heading)
    for finding in list_implementations():
        table.add_row(finding.operation, finding.provider, "yes" if finding.usable else "no", finding.note)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}."
    advice = "`python benchmarks/bring_up.py` runs each of them and says what works."
    return Group(table, _settings_table(), f"{versions} {advice}")


def _settings_table() -> Table:
    table = Table(title="Settings of ranks that start here", title_justify="left")
    for heading in ("setting", "value", "whose", "why"):
        table.add_column(heading)
    for setting in effective_settings(os.environ):
        table.add_row(*map(escape, (setting.name, setting.value, setting.whose, setting.why)))
    return table
