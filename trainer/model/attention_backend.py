"""Which kernel computes attention: named by `training.attention`, or chosen once at the start; then it is pinned.

`F.scaled_dot_product_attention` chooses anew in every call and does not say what it took: with an older cuDNN it takes
a kernel for SM80 at widths of 192 and 128, about three times as slow on Hopper, and where no kernel serves, the product
with all scores in memory (8.6 GB a layer for DeepSeek-V3). So each backend here calls one operator itself, and what the
operator cannot do is an error. `torch.nn.attention.sdpa_kernel` would pin the choice, too, but as a state of the thread
that has to be entered around every call, also in the backward's thread where attention is computed again. It also asks
the device in each call, which fake tensors (`shoestring rehearse`) do not have. The operators have autograd formulas
and fake kernels of their own.

Not yet run on hardware.

Letters: B batch, H heads, S sequence, W width of queries and keys, V of values.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ...comm.errors import ConfigError, Problem
from .causal import causal_attention

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Causal attention of q [B, H, S, W], k [B, H, S, W], v [B, H, S, V] and the scale of scores: [B, H, S, V]."""

FIELD = "training.attention"
MATH_LIMIT = 1_000_000_000
"""Bytes of the scores of one layer and micro-batch that `math` may take on a GPU."""

_FLASH3_MODULE = "flash_attn_interface"
_OLDEST_CUDNN = 91501
"""9.15.1. An earlier one reads beyond its inputs where the length is no multiple of 128 (pytorch#169849); torch itself
prefers cuDNN from this version on. 192/128 it serves from 9.11 on."""
_HALF = (torch.bfloat16, torch.float16)
_LATENT = (192, 128)
"""Widths of queries and keys, and of values, of the released models."""


def _cudnn(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by cuDNN's fused kernel."""
    if q_BHSW.shape[2] == 1:  # the operator refuses one key, whose probability is 1; text from a one-token prompt
        return v_BHSV
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    keeps = _keeps(q_BHSW, k_BHSW, v_BHSV)
    out_BHSV: Tensor = operator(q_BHSW, k_BHSW, v_BHSV, None, keeps, 0.0, True, scale=scale)[0]
    return out_BHSV


def _efficient(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by torch's memory-efficient kernel, which is made for SM80 and runs on later GPUs."""
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    keeps = _keeps(q_BHSW, k_BHSW, v_BHSV)
    out_BHSV: Tensor = operator(q_BHSW, k_BHSW, v_BHSV, None, keeps, 0.0, True, scale=scale)[0]
    return out_BHSV


def _flash3(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by FlashAttention-3, whose tensors are [B, S, H, any]."""
    flash = importlib.import_module(_FLASH3_MODULE).flash_attn_func
    heads = (x.transpose(1, 2) for x in (q_BHSW, k_BHSW, v_BHSV))
    found = flash(*heads, softmax_scale=scale, causal=True)
    out_BSHV: Tensor = found[0] if isinstance(found, tuple) else found  # its first releases return log-sum-exps, too
    return out_BSHV.transpose(1, 2)


def _math(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by plain products with all scores in memory, FP32 at least."""
    operator = torch.ops.aten._scaled_dot_product_attention_math
    out_BHSV: Tensor = operator(q_BHSW, k_BHSW, v_BHSV, None, 0.0, True, scale=scale)[0]
    return out_BHSV


def _keeps(*inputs: Tensor) -> bool:
    """Whether a backward will come, which wants the log-sum-exp of each query's scores."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention."""

    name: str
    """In `training.attention`."""
    attend: Attend
    what: str
    """What it runs."""


BLOCKS = AttentionBackend("blocks", causal_attention, "blocks of plain products, for CPUs")
BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            # No measurement of the first two at widths of 192 and 128 is known. cuDNN comes with torch, whose own
            # choice it is on Hopper, so `auto` takes it first.
            AttentionBackend("cudnn", _cudnn, "cuDNN's fused kernel"),
            AttentionBackend("flash3", _flash3, "FlashAttention-3"),
            AttentionBackend("efficient", _efficient, "torch's memory-efficient kernel, made for SM80"),
            AttentionBackend("math", _math, "plain products, all scores in memory"),
        )
    }
)
"""Those of GPUs, in the order in which `auto` tries them."""


@dataclass(frozen=True)
class AttentionCase:
    """The attention that a run asks for, on one rank and for one micro-batch."""

    batch: int
    heads: int
    length: int
    qk_width: int
    v_width: int
    dtype: torch.dtype

    @property
    def score_bytes(self) -> int:
        """What all scores of one layer take, in FP32 at least."""
        wide = torch.promote_types(self.dtype, torch.float32).itemsize
        return self.batch * self.heads * self.length**2 * wide


@dataclass(frozen=True)
class GpuFacts:
    """What a GPU and its libraries are, as far as the choice depends on it."""

    capability: tuple[int, int]
    cudnn: int | None
    """Its version, 91501 for 9.15.1; None where torch has none."""
    flash3: str | None
    """Why FlashAttention-3 cannot be used; None where it can."""

    @staticmethod
    def here() -> GpuFacts:
        """Those of the current device."""
        return GpuFacts(torch.cuda.get_device_capability(), torch.backends.cudnn.version(), missing_for_flash3())


def missing_for_flash3() -> str | None:
    """Return why FlashAttention-3 does not load here, None where it does."""
    build = "build it from the folder `hopper` of the flash-attention repository, for this torch"
    if importlib.util.find_spec(_FLASH3_MODULE) is None:
        return f"{_FLASH3_MODULE} is not installed; {build}"
    try:
        importlib.import_module(_FLASH3_MODULE)
    except Exception as fault:  # whatever a library that was built for another torch or CUDA raises
        return f"{_FLASH3_MODULE} does not load; {build} ({fault!r})"
    return None


def unfit(name: str, case: AttentionCase) -> Iterator[str]:
    """Yield why no GPU can compute `case` by the backend `name`."""
    widths = (case.qk_width, case.v_width)
    numbers = str(case.dtype).removeprefix("torch.")
    if name in ("cudnn", "flash3"):
        if case.dtype not in _HALF:
            yield f"it computes in BF16 and FP16 and the run in {numbers}; write training.attention=auto"
        if any(width % 8 for width in widths):
            yield f"its heads have widths that are multiples of 8, and the model's are {_pair(widths)}"
    if name == "cudnn":
        if widths != _LATENT and max(widths) > 128:
            yield f"it serves widths of 192/128, and any up to 128, and the model's are {_pair(widths)}"
        if case.length == 1:
            yield "it wants sequences of two tokens at least"
    if name == "flash3" and widths != _LATENT and (widths[0] != widths[1] or max(widths) > 256):
        yield f"it serves widths of 192/128, and equal ones up to 256, and the model's are {_pair(widths)}"
    if name == "efficient":
        if case.dtype == torch.float64:
            yield "it does not compute in float64; write training.attention=math"
        step = 8 if case.dtype in _HALF else 4
        if any(width % step for width in widths):
            yield f"in {numbers} its heads have widths that are multiples of {step}, the model's are {_pair(widths)}"
    if name == "math" and case.score_bytes > MATH_LIMIT:
        shape = f"{case.batch} x {case.heads} heads x {case.length}²"
        yield (
            f"the scores of a layer ({shape}) take {case.score_bytes / 1e9:.1f} GB, more than {MATH_LIMIT / 1e9:g} GB; "
            "write training.attention=auto, whose other backends keep none, or a shorter training.sequence_length"
        )


def missing_here(name: str, case: AttentionCase, gpu: GpuFacts) -> Iterator[str]:
    """Yield why this GPU cannot compute `case` by the backend `name`, where another could."""
    has = f"the one here has {gpu.capability[0]}.{gpu.capability[1]}"
    if name != "math" and case.dtype == torch.bfloat16 and gpu.capability < (8, 0):
        yield f"in BF16 it needs a GPU of compute capability 8.0 or later and {has}"
    if name == "cudnn":
        if (case.qk_width, case.v_width) == _LATENT and gpu.capability[0] not in (9, 10):
            yield f"for widths of 192/128 it needs a GPU of compute capability 9.0 or 10.x and {has}"
        if gpu.cudnn is None or gpu.cudnn < _OLDEST_CUDNN:
            found = "none" if gpu.cudnn is None else cudnn_text(gpu.cudnn)
            hint = "install a torch for CUDA 13, whose wheels bring a later one"
            yield f"it needs cuDNN {cudnn_text(_OLDEST_CUDNN)} or later and torch has {found}; {hint}"
    if name == "flash3":
        if gpu.capability[0] != 9:
            yield f"it needs a GPU of compute capability 9.0 and {has}"
        if gpu.flash3 is not None:
            yield gpu.flash3


def cudnn_text(version: int) -> str:
    """Return the number that `torch.backends.cudnn.version` gives as people write it: 91501 is 9.15.1."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _pair(widths: tuple[int, int]) -> str:
    return f"{widths[0]}/{widths[1]}"


@dataclass(frozen=True)
class AttentionChoice:
    """What computes attention in a run, and why."""

    backend: AttentionBackend
    reason: str

    @property
    def attend(self) -> Attend:
        """The backend's function."""
        return self.backend.attend

    def __str__(self) -> str:
        return f"{self.backend.name} ({self.backend.what}): {self.reason}"


ON_CPU = AttentionChoice(BLOCKS, "a CPU has no other")


def named_attention(name: str) -> AttentionChoice:
    """Return the backend of this name, asking no device."""
    return AttentionChoice(BACKENDS[name], f"{FIELD}={name}")


def choose_attention(name: str, case: AttentionCase, gpu: GpuFacts) -> AttentionChoice:
    """Return what computes `case` on `gpu`: the backend of this name, or for `auto` the first that serves.

    Raises `ConfigError` where the named one does not serve, or none does.
    """
    passed: list[str] = []
    for each in (name,) if name != "auto" else BACKENDS:
        missing = [*unfit(each, case), *missing_here(each, case, gpu)]
        if not missing:
            return named_attention(each) if name != "auto" else _first(each, case, gpu, passed)
        passed.append(f"{each}: {'; '.join(missing)}")
    hint = passed[0].partition(": ")[2] if name != "auto" else f"nothing serves this run. {' | '.join(passed)}"
    raise ConfigError([Problem(FIELD, name, hint)])


def _first(name: str, case: AttentionCase, gpu: GpuFacts, passed: list[str]) -> AttentionChoice:
    """`name`, the first in the order that serves."""
    library = f", cuDNN {cudnn_text(gpu.cudnn)}" if gpu.cudnn is not None else ""
    where = f"on compute capability {gpu.capability[0]}.{gpu.capability[1]}{library}"
    serves = f"auto: serves widths of {_pair((case.qk_width, case.v_width))} {where}"
    return AttentionChoice(BACKENDS[name], "; not ".join([serves, *passed]))


def try_attention(choice: AttentionChoice, case: AttentionCase, device: torch.device) -> None:
    """Compute `case` once, forward and backward, as the run will; raise `ConfigError` with what the library says.

    cuDNN and FlashAttention-3 say no only when they are called. cuDNN also makes its plans now (up to a second), one
    for each shape and thread, and not in the first step.
    """
    shape, widths = (case.batch, case.length, case.heads), (case.qk_width, case.qk_width, case.v_width)
    leaves = [torch.zeros((*shape, width), dtype=case.dtype, device=device, requires_grad=True) for width in widths]
    q_BHSW, k_BHSW, v_BHSV = (x.transpose(1, 2) for x in leaves)
    try:
        out = choice.attend(q_BHSW, k_BHSW, v_BHSV, case.qk_width**-0.5)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        is_finite = all(bool(x.isfinite().all()) for x in (out, *grads))
    except Exception as fault:  # as many kinds as there are libraries
        raise _fails(choice, f"it fails at this run's shape: {fault}") from fault
    if not is_finite:
        raise _fails(choice, "of zeros it makes numbers that are not finite")


def _fails(choice: AttentionChoice, what: str) -> ConfigError:
    others = " or ".join(f"{FIELD}={name}" for name in BACKENDS if name != choice.backend.name)
    return ConfigError([Problem(FIELD, choice.backend.name, f"{what}; write {others}")])
