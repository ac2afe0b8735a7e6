"""The Transformer Engine backend's calls, against a stand-in; and when the backend is available."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoestring.tests.trainer.precision import te_stand_in
from shoestring.tests.trainer.precision.against_reference import check_products
from shoestring.trainer.precision.backend import open_backend, unavailable_reasons

OURS = "shoestring.trainer.precision.te_backend"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Return a folder for a package, on a simulated Hopper GPU; none of it stays imported afterwards."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name == OURS or name.startswith("transformer_engine"):
            del sys.modules[name]


def test_products_are_the_references(place: Path) -> None:
    te_stand_in.install(place)
    check_products(open_backend("te", torch.device("cpu")), torch.device("cpu"))


def test_it_serves_where_its_library_loads(place: Path) -> None:
    te_stand_in.install(place)
    assert "transformer_engine_torch" not in sys.modules  # a search would not find it
    assert not list(unavailable_reasons("te", on_gpu=True))
    assert "transformer_engine_torch" in sys.modules


def test_a_library_that_does_not_load_is_reported(place: Path) -> None:
    te_stand_in.install(place)
    (place / "transformer_engine/wheel_lib/transformer_engine_torch.py").write_text("raise OSError('no libcublas')")
    (said,) = unavailable_reasons("te", on_gpu=True)
    assert "transformer_engine does not load" in said
    assert "no libcublas" in said


def test_an_older_one_is_reported_unusable(place: Path) -> None:
    te_stand_in.install(place)
    (place / "transformer_engine/pytorch/constants.py").write_text("")
    (said,) = unavailable_reasons("te", on_gpu=True)
    assert "2.20 or later" in said


@pytest.mark.usefixtures("place")
def test_without_the_package_nothing_is_loaded() -> None:
    (said,) = unavailable_reasons("te", on_gpu=True)
    assert "is not installed" in said
