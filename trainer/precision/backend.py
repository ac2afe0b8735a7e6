"""Operations of FP8 backends, and the selection of one (report §3.3).

Letters: X rows, D width, R rows of activations, F inner width, L experts on this rank; N, K sides of a weight [N, K].
"""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...comm.fp8 import TILE_WIDTH
from .fp8_tensors import (
    ColumnwiseFp8Tensor,
    Fp8Weight,
    RowwiseFp8Tensor,
    ScaleFormat,
    dequantize_rowwise,
    quantize_columnwise,
    quantize_rowwise,
    quantize_weight,
)
from .swiglu import swiglu

RowsPerExpert = tuple[int, ...]
"""Number of rows of each expert; rows are sorted by expert."""


class PrecisionBackend:
    """FP8 backend: quantization, and GEMMs of quantized operands with FP32 sums every 128 products.

    It quantizes in plain tensor operations and multiplies one expert at a time; subclasses multiply, or do all faster.
    """

    def product(self, a: RowwiseFp8Tensor, b: RowwiseFp8Tensor | Fp8Weight, dtype: torch.dtype) -> Tensor:
        """Return a bᵀ of X rows and Y rows, [X, Y] in `dtype`; `gemm` and the weight gradients are such products."""
        raise NotImplementedError

    def quantize_rowwise(self, x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
        """Quantize rows in tiles of 1 × 128."""
        return quantize_rowwise(x_XD, scales)

    def swiglu_quantize_rowwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, scales: ScaleFormat
    ) -> RowwiseFp8Tensor:
        """Quantize SwiGLU of [R, 2F], times the row's gate weight if given, in tiles of 1 × 128, [R, F]."""
        return self.quantize_rowwise(swiglu(gate_up_RF, gates_R), scales)

    def quantize_columnwise(self, x_RD: Tensor, rows_L: RowsPerExpert, scales: ScaleFormat) -> ColumnwiseFp8Tensor:
        """Quantize rows column-wise, in tiles of 128 × 1 that do not cross experts."""
        return quantize_columnwise(x_RD, rows_L, scales)

    def rowwise_to_columnwise(
        self, x: RowwiseFp8Tensor, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        """Quantize the numbers of tiles of 1 × 128 column-wise, as `quantize_columnwise` does."""
        return self.quantize_columnwise(dequantize_rowwise(x, torch.float32), rows_L, scales)

    def swiglu_quantize_columnwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        """Quantize SwiGLU of [R, 2F], times the row's gate weight if given, column-wise."""
        return self.quantize_columnwise(swiglu(gate_up_RF, gates_R), rows_L, scales)

    def quantize_weight(self, weight: Tensor, scales: ScaleFormat) -> Fp8Weight:
        """Quantize a weight [N, K] or a stack of weights [L, N, K] in blocks of 128 × 128."""
        return quantize_weight(weight, scales)

    def gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
        """Return x Wᵀ, [R, N] in `dtype`, of x [R, K] and W [N, K]."""
        return self.product(x, weight, dtype)

    def grouped_gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, rows_L: RowsPerExpert, dtype: torch.dtype) -> Tensor:
        """Return x Wᵀ, [R, N] in `dtype`, of x [R, K] and each row's expert of W [L, N, K]."""
        rows = zip(x.values_XD.split(rows_L), x.scales_XQ.split(rows_L), strict=True)
        weights = zip(weight.values_NK, weight.scales_PQ, strict=True)
        parts = zip(rows, weights, strict=True)
        return torch.cat([self.gemm(RowwiseFp8Tensor(*own), Fp8Weight(*expert), dtype) for own, expert in parts])

    def grouped_wgrad_gemm(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor) -> Tensor:
        """Return the weight gradients gradᵀ x over the rows of each expert, FP32 [L, N, K]; 0 without rows."""
        both = zip(split_by_expert(grad), split_by_expert(x), strict=True)
        return torch.stack([self.product(ours, theirs, torch.float32) for ours, theirs in both])

    def accumulate_grouped_wgrad(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor, sum_LNK: Tensor) -> None:
        """Add `grouped_wgrad_gemm` to `sum_LNK` in place, in its dtype."""
        sum_LNK += self.grouped_wgrad_gemm(grad, x)


def split_by_expert(columns: ColumnwiseFp8Tensor) -> list[RowwiseFp8Tensor]:
    """Split a column-wise tensor into those of the experts."""
    counts = columns.tiles_per_expert_L
    values = columns.tiles.values_XD.split([count * TILE_WIDTH for count in counts], dim=1)
    scales = columns.tiles.scales_XQ.split(counts, dim=1)
    return [RowwiseFp8Tensor(own, scale) for own, scale in zip(values, scales, strict=True)]


# Imported when it is chosen: `triton` and `te` need optional packages, `torch` a torch with `scaled_mm`.
_CLASSES: Mapping[str, tuple[str, str]] = {
    "triton": (".triton_backend", "TritonBackend"),
    "torch": (".torch_backend", "TorchBackend"),
    "te": (".te_backend", "TransformerEngineBackend"),
    "reference": (".reference", "ReferenceBackend"),
}
BACKEND_NAMES = tuple(_CLASSES)
"""Names of the backends, fastest first. All but the last need a Hopper GPU, and have not yet run on one."""

_HOPPER = (9, 0)


def unavailable_reasons(name: str, *, on_gpu: bool) -> Iterator[str]:
    """Yield why the backend of this name cannot run on this machine's GPUs, or on its CPU."""
    if name == "reference":
        return
    if name == "triton" and importlib.util.find_spec("triton") is None:
        yield "triton is not installed; pip install the triton version that this torch was built with"
    if name == "te":
        yield from _missing_of_te(on_gpu=on_gpu)
    if not on_gpu:
        yield "it needs a Hopper GPU; set precision.fp8_backend=reference on other machines"
        return
    capability = torch.cuda.get_device_capability()
    if capability != _HOPPER:
        yield f"it needs a GPU of compute capability 9.0 and the one here has {capability[0]}.{capability[1]}"
    if name == "torch" and (torch.version.cuda is None or _version(torch.version.cuda) < (12, 9)):
        yield f"it needs a torch built with CUDA 12.9 or later, and this one has {torch.version.cuda}"


def _missing_of_te(*, on_gpu: bool) -> Iterator[str]:
    """Yield why Transformer Engine cannot be used."""
    # Its library for torch lies in the package's folder, where `find_spec` does not see it, so on a GPU it is imported.
    if importlib.util.find_spec("transformer_engine") is None:
        yield "transformer_engine is not installed; pip install transformer-engine[pytorch], 2.20 or later"
    elif on_gpu:
        try:
            importlib.import_module(".te_backend", __package__)
        except Exception as fault:  # an older version, or one built for another torch or CUDA, may raise anything
            yield f"transformer_engine does not load; install 2.20 or later for this torch ({fault!r})"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def choose_backend(name: str, *, on_gpu: bool) -> str:
    """Return the backend that `auto` selects, the first that can run; return any other name unchanged."""
    if name != "auto":
        return name
    return next(each for each in BACKEND_NAMES if not any(unavailable_reasons(each, on_gpu=on_gpu)))


def open_backend(name: str, device: torch.device) -> PrecisionBackend:
    """Open the backend of this name, or the one that `auto` selects for `device`."""
    module, cls = _CLASSES[choose_backend(name, on_gpu=device.type == "cuda")]
    backend: PrecisionBackend = getattr(importlib.import_module(module, __package__), cls)()
    return backend
