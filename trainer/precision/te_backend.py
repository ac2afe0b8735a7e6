"""FP8 GEMMs by Transformer Engine's block-scaled GEMM. Not yet run on hardware; written for version 2.20.

Transformer Engine stores such a matrix as bytes [M, K] and the scales that cuBLASLt reads: of tiles [K/128, M], of
blocks [M/128, K/128], rows of scales padded to multiples of four. Both operands are row-major, so no GEMM needs a
transposed copy (layout TN: the first one's transpose is taken). The operands are quantized here, with the tiles of its
recipe `Float8BlockScaling` (1 × 128 for activations and gradients, 128 × 128 for weights).

Letters: M, N, K sides of a product, Q tiles of a row.
"""

from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DType
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from typing_extensions import override

from ...comm.fp8 import TILE_WIDTH, tiles_per_row
from ...comm.units import round_up
from .backend import PrecisionBackend
from .fp8_tensors import Fp8Weight, RowwiseFp8Tensor, gemm_output_dtype, zero_pad

_FOURS = 4


class TransformerEngineBackend(PrecisionBackend):
    """FP8 backend by Transformer Engine."""

    @override
    def product(self, a: RowwiseFp8Tensor, b: RowwiseFp8Tensor | Fp8Weight, dtype: torch.dtype) -> Tensor:
        rows, columns = len(a.values_XD), len(b.values_NK if isinstance(b, Fp8Weight) else b.values_XD)
        if not a.values_XD.numel():
            return a.scales_XQ.new_zeros((rows, columns), dtype=dtype)
        # Transformer Engine orders operands as cuBLAS does, column-major, so the second comes first.
        out: Tensor = general_gemm(
            _storage(b), _storage(a), out_dtype=gemm_output_dtype(dtype), layout="TN", use_split_accumulator=True
        )[0]
        return out[:rows, :columns].to(dtype)


def _storage(operand: RowwiseFp8Tensor | Fp8Weight) -> Any:
    """Return an operand as Transformer Engine stores it, its sides multiples of 128 as its quantizer requires."""
    numbers = operand.values_NK if isinstance(operand, Fp8Weight) else operand.values_XD
    values = zero_pad(numbers, *(round_up(side, TILE_WIDTH) for side in numbers.shape))
    if isinstance(operand, Fp8Weight):
        columns = operand.scales_PQ.shape[1]
        scales = zero_pad(operand.scales_PQ, tiles_per_row(len(values)), round_up(columns, _FOURS))
    else:
        scales = zero_pad(operand.scales_XQ.T, operand.scales_XQ.shape[1], round_up(len(values), _FOURS))
    return Float8BlockwiseQTensorStorage(
        rowwise_data=values.view(torch.uint8),
        rowwise_scale_inv=scales,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=None,
        is_2D_scaled=isinstance(operand, Fp8Weight),
    )
