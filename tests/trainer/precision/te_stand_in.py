"""A Transformer Engine stand-in with the checks and the layout of the real one.

The library behind it, `transformer_engine_torch`, lies inside the package and is a module only once
`transformer_engine.pytorch` has loaded it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoestring.comm.fp8 import TILE_WIDTH, tiles_per_row
from shoestring.trainer.precision.fp8_tensors import RowwiseFp8Tensor
from shoestring.trainer.precision.reference import ReferenceBackend

_LOAD = """
import importlib.util, pathlib, sys

name = "transformer_engine_torch"
place = pathlib.Path(__file__).parents[1] / "wheel_lib" / f"{name}.py"
spec = importlib.util.spec_from_file_location(name, place)
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
from .constants import DType
"""
_OURS = f"from {__name__} import"
FILES = {
    "__init__.py": "from . import pytorch",
    "wheel_lib/transformer_engine_torch.py": f"{_OURS} E4M3",
    "pytorch/__init__.py": _LOAD,
    "pytorch/constants.py": "import transformer_engine_torch\nclass DType: kFloat8E4M3 = transformer_engine_torch.E4M3",
    "pytorch/cpp_extensions/__init__.py": f"import transformer_engine_torch\n{_OURS} general_gemm",
    "pytorch/tensor/__init__.py": "",
    "pytorch/tensor/storage/__init__.py": "",
    "pytorch/tensor/storage/float8_blockwise_tensor_storage.py": f"{_OURS} Float8BlockwiseQTensorStorage",
}

E4M3 = object()


def install(directory: Path) -> None:
    """Write the package into this directory."""
    for name, source in FILES.items():
        file = directory / "transformer_engine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)


@dataclass(kw_only=True)
class Float8BlockwiseQTensorStorage:
    """The part of the class that a product reads."""

    rowwise_data: Tensor
    rowwise_scale_inv: Tensor
    columnwise_data: None
    columnwise_scale_inv: None
    fp8_dtype: object
    quantizer: None
    is_2D_scaled: bool

    def tiles(self) -> RowwiseFp8Tensor:
        """Check shapes as the quantizer makes them; return the tensor with the scale of each tile."""
        rows, width = self.rowwise_data.shape
        assert self.fp8_dtype is E4M3
        assert self.rowwise_data.dtype == torch.uint8
        assert self.rowwise_data.is_contiguous()
        assert self.rowwise_scale_inv.is_contiguous()
        assert rows % TILE_WIDTH == width % TILE_WIDTH == 0
        if self.is_2D_scaled:
            assert self.rowwise_scale_inv.shape == (tiles_per_row(rows), -(-tiles_per_row(width) // 4) * 4)
            scales_XQ = self.rowwise_scale_inv[:, : tiles_per_row(width)].repeat_interleave(TILE_WIDTH, 0)
        else:
            assert self.rowwise_scale_inv.shape == (tiles_per_row(width), -(-rows // 4) * 4)
            scales_XQ = self.rowwise_scale_inv.T[:rows]
        return RowwiseFp8Tensor(self.rowwise_data.view(torch.float8_e4m3fn), scales_XQ)


def general_gemm(
    A: Float8BlockwiseQTensorStorage,
    B: Float8BlockwiseQTensorStorage,
    out_dtype: torch.dtype,
    layout: str,
    use_split_accumulator: bool,
) -> tuple[Tensor, None, None, None]:
    assert layout == "TN"
    assert use_split_accumulator
    assert not (A.is_2D_scaled and B.is_2D_scaled)
    return ReferenceBackend().product(B.tiles(), A.tiles(), out_dtype), None, None, None
