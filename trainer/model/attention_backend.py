"""Attention backends: the kernel is named by `training.attention_backend`, or selected once at the start of a run.

Each backend calls one operator, and a shape that the operator does not support is an error. Not yet run on hardware.

Letters: B batch, H heads, S sequence, W width of queries and keys, V of values.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ...comm.errors import ConfigError, Problem
from ...comm.units import format_giga
from .cpu_attention import causal_attention

# Why not `F.scaled_dot_product_attention`: it selects a kernel in every call and does not report which. With an older
# cuDNN it takes a kernel for SM80 at head widths 192/128, about three times as slow on Hopper; if no kernel supports
# the inputs, it keeps all scores in memory (8.6 GB per layer for DeepSeek-V3).
# Why not `torch.nn.attention.sdpa_kernel`: it sets thread state that must be entered around every call, also in the
# backward's thread under recomputation, and queries the device, which fake tensors (`shoestring rehearse`) do not have.

AttentionFunction = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Causal attention of q [B, H, S, W], k [B, H, S, W], v [B, H, S, V] and the scale of scores: [B, H, S, V]."""

CONFIG_KEY = "training.attention_backend"
MATH_MAX_SCORE_BYTES = 1_000_000_000
"""Largest score matrix of one layer and micro-batch with which `math` may run on a GPU, in bytes."""

_FLASH3_MODULE = "flash_attn_interface"
# 9.15.1, from which on torch itself prefers cuDNN. Earlier versions read beyond their inputs if the sequence length is
# not a multiple of 128 (pytorch#169849). Head widths of 192/128 are supported from 9.11 on.
_OLDEST_CUDNN = 91501
_HALF = (torch.bfloat16, torch.float16)
_LATENT = (192, 128)
"""Head widths of the released models: of queries and keys, and of values."""


def _cudnn(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by cuDNN's fused kernel."""
    # The operator refuses a single key, as in text generated from a one-token prompt; its probability is 1.
    if q_BHSW.shape[2] == 1:
        return v_BHSV
    return _fused(torch.ops.aten._scaled_dot_product_cudnn_attention, (q_BHSW, k_BHSW, v_BHSV), scale)


def _efficient(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by torch's memory-efficient kernel, written for SM80; it also runs on later GPUs."""
    return _fused(torch.ops.aten._scaled_dot_product_efficient_attention, (q_BHSW, k_BHSW, v_BHSV), scale)


def _fused(operator: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], scale: float) -> Tensor:
    # A backward needs the log-sum-exp of each query's scores.
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return operator(*inputs, None, keeps, 0.0, True, scale=scale)[0]


def _flash3(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by FlashAttention-3, whose tensors are [B, S, H, any]."""
    flash = importlib.import_module(_FLASH3_MODULE).flash_attn_func
    heads = (x.transpose(1, 2) for x in (q_BHSW, k_BHSW, v_BHSV))
    result = flash(*heads, softmax_scale=scale, causal=True)
    out_BSHV: Tensor = result[0] if isinstance(result, tuple) else result  # its first releases return log-sum-exps, too
    return out_BSHV.transpose(1, 2)


def _math(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Attend by plain products with all scores in memory, FP32 or wider."""
    operator = torch.ops.aten._scaled_dot_product_attention_math
    out_BHSV: Tensor = operator(q_BHSW, k_BHSW, v_BHSV, None, 0.0, True, scale=scale)[0]
    return out_BHSV


@dataclass(frozen=True)
class AttentionBackend:
    """Implementation of core attention."""

    name: str
    """Value of `training.attention_backend`."""
    core_attention: AttentionFunction
    description: str
    """Kernel that it runs, in words."""
    reason: str = ""
    """Reason why a run uses it."""

    def __str__(self) -> str:
        return f"{self.name} ({self.description}): {self.reason}"


CPU_ATTENTION = AttentionBackend(
    "blocks", causal_attention, "blocks of plain products, for CPUs", "the only backend for CPUs"
)
GPU_BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            # No measurement of the first two at head widths 192/128 is published. cuDNN comes with torch and is torch's
            # own choice on Hopper, so `auto` tries it first.
            AttentionBackend("cudnn", _cudnn, "cuDNN's fused kernel"),
            AttentionBackend("flash3", _flash3, "FlashAttention-3"),
            AttentionBackend("efficient", _efficient, "torch's memory-efficient kernel, made for SM80"),
            AttentionBackend("math", _math, "plain products, all scores in memory"),
        )
    }
)
"""Attention backends of GPUs, in the order in which `auto` tries them."""


@dataclass(frozen=True)
class AttentionShape:
    """Shape of attention on one rank for one micro-batch."""

    batch: int
    heads: int
    sequence_length: int
    qk_head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @property
    def score_bytes(self) -> int:
        """Bytes of all scores of one layer, in FP32 or wider."""
        wide = torch.promote_types(self.dtype, torch.float32).itemsize
        return self.batch * self.heads * self.sequence_length**2 * wide


@dataclass(frozen=True)
class GpuCapabilities:
    """Properties of a GPU and its libraries that decide which attention backends it supports."""

    compute_capability: tuple[int, int]
    cudnn_version: int | None
    """Version of torch's cuDNN, 91501 for 9.15.1; None without cuDNN."""
    flash3_unavailable_reason: str | None
    """Reason why FlashAttention-3 cannot be used; None if it can."""

    @staticmethod
    def detect() -> "GpuCapabilities":
        """Return the capabilities of the current device."""
        return GpuCapabilities(
            torch.cuda.get_device_capability(), torch.backends.cudnn.version(), why_flash3_is_unavailable()
        )


def why_flash3_is_unavailable() -> str | None:
    """Return why FlashAttention-3 does not load on this machine; None if it does."""
    build = "build it from the folder `hopper` of the flash-attention repository, for this torch"
    if importlib.util.find_spec(_FLASH3_MODULE) is None:
        return f"{_FLASH3_MODULE} is not installed; {build}"
    try:
        importlib.import_module(_FLASH3_MODULE)
    except Exception as fault:  # a library built for another torch or CUDA may raise anything
        return f"{_FLASH3_MODULE} does not load; {build} ({fault!r})"
    return None


def unsupported_shape_reasons(name: str, case: AttentionShape) -> Iterator[str]:
    """Yield why the backend `name` does not support the shape `case` on any GPU."""
    widths = (case.qk_head_dim, case.v_head_dim)
    numbers = str(case.dtype).removeprefix("torch.")
    if name in ("cudnn", "flash3"):
        if case.dtype not in _HALF:
            yield f"it computes in BF16 and FP16, the run in {numbers}; set training.attention_backend=auto"
        if any(width % 8 for width in widths):
            yield f"it needs head widths that are multiples of 8; the model's are {_pair(widths)}"
    if name == "cudnn":
        if widths != _LATENT and max(widths) > 128:
            yield f"it supports head widths of 192/128 or at most 128; the model's are {_pair(widths)}"
        if case.sequence_length == 1:
            yield "it needs sequences of at least two tokens"
    if name == "flash3" and widths != _LATENT and (widths[0] != widths[1] or max(widths) > 256):
        yield f"it supports head widths of 192/128, or equal ones up to 256; the model's are {_pair(widths)}"
    if name == "efficient":
        if case.dtype == torch.float64:
            yield "it does not compute in float64; set training.attention_backend=math"
        step = 8 if case.dtype in _HALF else 4
        if any(width % step for width in widths):
            yield f"in {numbers} it needs head widths that are multiples of {step}; the model's are {_pair(widths)}"
    if name == "math" and case.score_bytes > MATH_MAX_SCORE_BYTES:
        shape = f"{case.batch} x {case.heads} heads x {case.sequence_length}²"
        yield (
            f"the scores of a layer ({shape}) take {format_giga(case.score_bytes, 1)} GB, "
            f"more than {MATH_MAX_SCORE_BYTES / 1e9:g} GB; set training.attention_backend=auto, "
            "whose other backends keep no scores, or a shorter training.sequence_length"
        )


def unsupported_gpu_reasons(name: str, case: AttentionShape, gpu: GpuCapabilities) -> Iterator[str]:
    """Yield why the backend `name` cannot compute `case` on this GPU, although it could on another."""
    has = f"the one here has {gpu.compute_capability[0]}.{gpu.compute_capability[1]}"
    if name != "math" and case.dtype == torch.bfloat16 and gpu.compute_capability < (8, 0):
        yield f"in BF16 it needs a GPU of compute capability 8.0 or later and {has}"
    if name == "cudnn":
        if (case.qk_head_dim, case.v_head_dim) == _LATENT and gpu.compute_capability[0] not in (9, 10):
            yield f"for head widths of 192/128 it needs a GPU of compute capability 9.0 or 10.x and {has}"
        if gpu.cudnn_version is None or gpu.cudnn_version < _OLDEST_CUDNN:
            found = "none" if gpu.cudnn_version is None else format_cudnn_version(gpu.cudnn_version)
            hint = "install a torch for CUDA 13, whose wheels include a later version"
            yield f"it needs cuDNN {format_cudnn_version(_OLDEST_CUDNN)} or later and torch has {found}; {hint}"
    if name == "flash3":
        if gpu.compute_capability[0] != 9:
            yield f"it needs a GPU of compute capability 9.0 and {has}"
        if gpu.flash3_unavailable_reason is not None:
            yield gpu.flash3_unavailable_reason


def format_cudnn_version(version: int) -> str:
    """Format the number of `torch.backends.cudnn.version`: 91501 is 9.15.1."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _pair(widths: tuple[int, int]) -> str:
    return f"{widths[0]}/{widths[1]}"


def attention_by_name(name: str) -> AttentionBackend:
    """Return the backend of this name, without querying a device."""
    return replace(GPU_BACKENDS[name], reason=f"{CONFIG_KEY}={name}")


def choose_attention(name: str, case: AttentionShape, device: torch.device) -> AttentionBackend:
    """Return the backend of a run on `device`, whose capabilities are read only if `name` is `auto`.

    Raises `ConfigError` if no backend supports `case` there.
    """
    if device.type == "cpu":
        return CPU_ATTENTION
    return select_attention(name, case, GpuCapabilities.detect()) if name == "auto" else attention_by_name(name)


def select_attention(name: str, case: AttentionShape, gpu: GpuCapabilities) -> AttentionBackend:
    """Return the backend `name`, or for `auto` the first that supports `case` on `gpu`.

    Raises `ConfigError` if the named backend does not support it, or none does.
    """
    passed: list[str] = []
    for each in (name,) if name != "auto" else GPU_BACKENDS:
        missing = [*unsupported_shape_reasons(each, case), *unsupported_gpu_reasons(each, case, gpu)]
        if not missing:
            return attention_by_name(each) if name != "auto" else _first(each, case, gpu, passed)
        passed.append(f"{each}: {'; '.join(missing)}")
    hint = passed[0].partition(": ")[2] if name != "auto" else f"no backend supports this run. {' | '.join(passed)}"
    raise ConfigError([Problem(CONFIG_KEY, name, hint)])


def _first(name: str, case: AttentionShape, gpu: GpuCapabilities, passed: list[str]) -> AttentionBackend:
    """Return the selection of `name` by `auto`, with the reasons against the backends before it."""
    library = f", cuDNN {format_cudnn_version(gpu.cudnn_version)}" if gpu.cudnn_version is not None else ""
    where = f"on compute capability {gpu.compute_capability[0]}.{gpu.compute_capability[1]}{library}"
    supports = f"auto: supports head widths of {_pair((case.qk_head_dim, case.v_head_dim))} {where}"
    return replace(GPU_BACKENDS[name], reason="; not ".join([supports, *passed]))


def probe_attention(choice: AttentionBackend, case: AttentionShape, device: torch.device) -> None:
    """Compute `case` once, forward and backward, as the run will; raise `ConfigError` with the library's error."""
    # cuDNN and FlashAttention-3 report that they do not support a shape only when called. cuDNN also builds its plans
    # now (up to a second for each shape and thread) instead of in the first step.
    shape = (case.batch, case.sequence_length, case.heads)
    widths = (case.qk_head_dim, case.qk_head_dim, case.v_head_dim)
    leaves = [torch.zeros((*shape, width), dtype=case.dtype, device=device, requires_grad=True) for width in widths]
    q_BHSW, k_BHSW, v_BHSV = (x.transpose(1, 2) for x in leaves)
    try:
        out = choice.core_attention(q_BHSW, k_BHSW, v_BHSV, case.qk_head_dim**-0.5)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        is_finite = all(bool(x.isfinite().all()) for x in (out, *grads))
    except Exception as fault:  # each library raises its own kinds
        raise _fails(choice, f"it fails at this run's shape: {fault}") from fault
    if not is_finite:
        raise _fails(choice, "its results for inputs of zeros are not finite")


def _fails(choice: AttentionBackend, what: str) -> ConfigError:
    others = " or ".join(f"{CONFIG_KEY}={name}" for name in GPU_BACKENDS if name != choice.name)
    return ConfigError([Problem(CONFIG_KEY, choice.name, f"{what}; set {others}")])
