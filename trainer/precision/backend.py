"""What computes in FP8: one small interface, several providers (report §3.3).

Letters: X rows, D width, R rows of activations, F inner width, L experts on this rank; N, K sides of a weight [N, K].
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .fp8_tensors import ColumnwiseFp8Tensor, Fp8Weight, RowwiseFp8Tensor, ScaleFormat
from .reference import ReferenceBackend

RowsPerExpert = tuple[int, ...]
"""How many rows each expert of a stack of weights has; they follow each other."""


class PrecisionBackend(Protocol):
    """Quantizes, and multiplies what it has quantized. Sums are formed in FP32, 128 products at a time."""

    def quantize_rowwise(self, x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
        """Rows in tiles of 1 × 128."""
        ...

    def swiglu_quantize_rowwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, scales: ScaleFormat
    ) -> RowwiseFp8Tensor:
        """SwiGLU of [R, 2F], each row times its gate weight where there are any, in tiles of 1 × 128, [R, F]."""
        ...

    def quantize_columnwise(self, x_RD: Tensor, rows_L: RowsPerExpert, scales: ScaleFormat) -> ColumnwiseFp8Tensor:
        """Rows the other way round, in tiles of 128 × 1, those of each expert apart."""
        ...

    def rowwise_to_columnwise(
        self, x: RowwiseFp8Tensor, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        """Rows that are in tiles of 1 × 128 the other way round, as `columns` of the numbers that they hold."""
        ...

    def swiglu_quantize_columnwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        """The same numbers the other way round, in tiles of 128 × 1, those of each expert apart."""
        ...

    def quantize_weight(self, weight: Tensor, scales: ScaleFormat) -> Fp8Weight:
        """A weight [N, K] or a stack of them [L, N, K] in blocks of 128 × 128."""
        ...

    def gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
        """x Wᵀ, [R, N] in `dtype`, of x [R, K] and W [N, K]."""
        ...

    def grouped_gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, rows_L: RowsPerExpert, dtype: torch.dtype) -> Tensor:
        """The same, each row with the weight of its expert, of W [L, N, K]."""
        ...

    def grouped_wgrad_gemm(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor) -> Tensor:
        """gradᵀ x over the rows of each expert, FP32 [L, N, K]: the gradient of weights; 0 for one without rows."""
        ...

    def accumulate_grouped_wgrad(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor, sum_LNK: Tensor) -> None:
        """Add the same to a sum that is there, in the sum's dtype."""
        ...


BACKEND_NAMES = ("triton", "torch", "te", "reference")
"""The faster ones first. All but the last need a Hopper GPU, and have not yet run on one."""

_HOPPER = (9, 0)


def unavailable_reasons(name: str, *, on_gpu: bool) -> Iterator[str]:
    """Why the provider of this name cannot serve this machine's GPUs, or its CPU; nothing where it can."""
    if name == "reference":
        return
    if name == "triton" and importlib.util.find_spec("triton") is None:
        yield "triton is not installed; pip install triton, the version that this torch was built with"
    if name == "te":
        yield from _missing_of_te(on_gpu=on_gpu)
    if not on_gpu:
        yield "it needs a Hopper GPU; train on one, or write precision.fp8_backend=reference"
        return
    capability = torch.cuda.get_device_capability()
    if capability != _HOPPER:
        yield f"it needs a GPU of compute capability 9.0 and the one here has {capability[0]}.{capability[1]}"
    if name == "torch" and (torch.version.cuda is None or _version(torch.version.cuda) < (12, 9)):
        yield f"it needs a torch built with CUDA 12.9 or later, and this one has {torch.version.cuda}"


def _missing_of_te(*, on_gpu: bool) -> Iterator[str]:
    """Its part for torch is a library in its own folder, which no search finds; on a GPU it is loaded instead."""
    if importlib.util.find_spec("transformer_engine") is None:
        yield "transformer_engine is not installed; pip install transformer-engine[pytorch], 2.20 or later"
    elif on_gpu:
        try:
            importlib.import_module(".te_backend", __package__)
        except Exception as fault:  # what one meets that is older, or was built for another torch or CUDA
            yield f"transformer_engine does not load; install 2.20 or later for this torch ({fault!r})"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def choose_backend(name: str, *, on_gpu: bool) -> str:
    """What `auto` stands for: the first that can serve; any other name is itself."""
    if name != "auto":
        return name
    return next(each for each in BACKEND_NAMES if not any(unavailable_reasons(each, on_gpu=on_gpu)))


def open_backend(name: str, device: torch.device) -> PrecisionBackend:
    """The provider of this name, or that which `auto` chooses."""
    chosen = choose_backend(name, on_gpu=device.type == "cuda")
    if chosen == "triton":
        from .triton_backend import TritonBackend  # optional package

        return TritonBackend()
    if chosen == "torch":
        from .torch_backend import TorchBackend  # its scaled_mm is younger than the oldest torch that trains

        return TorchBackend()
    if chosen == "te":
        from .te_backend import TransformerEngineBackend  # optional package

        return TransformerEngineBackend()
    return ReferenceBackend()
