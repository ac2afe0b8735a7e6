"""The backend that is chosen, and why the others are not."""

import importlib.util

import pytest
import torch

from shoestring.trainer.precision.backend import choose_backend, open_backend, unavailable_reasons
from shoestring.trainer.precision.reference import ReferenceBackend


def test_a_cpu_takes_the_reference() -> None:
    assert choose_backend("auto", on_gpu=False) == "reference"
    assert isinstance(open_backend("auto", torch.device("cpu")), ReferenceBackend)
    assert not list(unavailable_reasons("reference", on_gpu=False))


@pytest.mark.parametrize(
    ("capability", "cuda", "has_triton", "chosen"),
    [
        ((9, 0), "12.9", True, "triton"),
        ((9, 0), "13.0", False, "torch"),
        ((9, 0), "12.8", False, "reference"),
        ((10, 0), "13.0", True, "reference"),
        ((12, 0), "13.0", True, "reference"),
        ((8, 0), "13.0", True, "reference"),
    ],
)
def test_a_gpu_takes_the_fastest_that_serves_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, has_triton: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    there = {"triton"} if has_triton else set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    assert choose_backend("auto", on_gpu=True) == chosen
