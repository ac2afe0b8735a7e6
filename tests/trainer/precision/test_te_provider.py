"""What the Transformer Engine provider hands over, before stand-ins that demand what its source demands."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.comm.fp8 import TILE, tiles_of
from shoestring.tests.trainer.precision.against_twins import check_products
from shoestring.trainer.precision.provider import Provider
from shoestring.trainer.precision.reference import Reference
from shoestring.trainer.precision.tiles import Tiles

E4M3 = object()
OURS = "shoestring.trainer.precision.te_provider"


@dataclass(kw_only=True)
class Storage:
    """Transformer Engine's Float8BlockwiseQTensorStorage, as far as a product reads it."""

    rowwise_data: Tensor
    rowwise_scale_inv: Tensor
    columnwise_data: None
    columnwise_scale_inv: None
    fp8_dtype: object
    quantizer: None
    is_2D_scaled: bool

    def tiles(self) -> Tiles:
        """Checks shapes as its quantizer makes them, then reads the scale of each tile."""
        rows, width = self.rowwise_data.shape
        assert self.fp8_dtype is E4M3
        assert self.rowwise_data.dtype == torch.uint8
        assert self.rowwise_data.is_contiguous()
        assert self.rowwise_scale_inv.is_contiguous()
        assert rows % TILE == width % TILE == 0
        if self.is_2D_scaled:
            assert self.rowwise_scale_inv.shape == (tiles_of(rows), -(-tiles_of(width) // 4) * 4)
            scales_XQ = self.rowwise_scale_inv[:, : tiles_of(width)].repeat_interleave(TILE, 0)
        else:
            assert self.rowwise_scale_inv.shape == (tiles_of(width), -(-rows // 4) * 4)
            scales_XQ = self.rowwise_scale_inv.T[:rows]
        return Tiles(self.rowwise_data.view(torch.float8_e4m3fn), scales_XQ)


def general_gemm(
    A: Storage, B: Storage, out_dtype: torch.dtype, layout: str, use_split_accumulator: bool
) -> tuple[Tensor, None, None, None]:
    assert layout == "TN"
    assert use_split_accumulator
    assert not (A.is_2D_scaled and B.is_2D_scaled)
    return Reference()._product(B.tiles(), A.tiles()).to(out_dtype), None, None, None


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    package = "transformer_engine.pytorch"
    parts: dict[str, dict[str, Any]] = {
        "transformer_engine_torch": {"DType": SimpleNamespace(kFloat8E4M3=E4M3)},
        "transformer_engine": {},
        package: {},
        f"{package}.cpp_extensions": {"general_gemm": general_gemm},
        f"{package}.tensor": {},
        f"{package}.tensor.storage": {},
        f"{package}.tensor.storage.float8_blockwise_tensor_storage": {"Float8BlockwiseQTensorStorage": Storage},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    made: Provider = importlib.import_module(OURS).TransformerEngineProvider()
    monkeypatch.delitem(sys.modules, OURS)
    return made


def test_products_are_the_references(provider: Provider) -> None:
    check_products(provider, torch.device("cpu"))
