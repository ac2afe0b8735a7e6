"""Pinned memory of the requested size, against a stand-in for the CUDA runtime."""

import mmap

import pytest
import torch

from shoestring.comm.host_transfer import GrowableHostBuffer
from shoestring.tests.comm.pages import StandInPages


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> StandInPages:
    pages = StandInPages()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pages)
    return pages


@pytest.mark.parametrize("size", [1, 4096, 5000, 2**20 + 1])
def test_whole_pages_are_pinned_and_less_than_one_is_lost(size: int, pages: StandInPages) -> None:
    memory = GrowableHostBuffer()
    memory.grow(size, pinned=True)
    ((pointer, pinned),) = pages.pinned.items()
    assert pointer == memory.tensor.data_ptr()
    assert pointer % mmap.PAGESIZE == pinned % mmap.PAGESIZE == 0
    assert size <= pinned == len(memory.tensor) < size + mmap.PAGESIZE
    assert not memory.tensor.any()


def test_it_is_kept_until_more_is_asked_for_and_given_back_before_it_is_freed(pages: StandInPages) -> None:
    memory = GrowableHostBuffer()
    for size in (10_000, 5_000, 10_000):
        memory.grow(size, pinned=True)
    assert pages.log == ["pin"]
    memory.grow(20_000, pinned=True)
    assert pages.log == ["pin", "unpin", "pin"]
    memory.unpin()
    memory.unpin()
    assert pages.pinned == {}


def test_without_a_gpu_nothing_is_pinned(pages: StandInPages) -> None:
    memory = GrowableHostBuffer()
    memory.grow(10_000, pinned=False)
    memory.unpin()
    assert pages.log == []


def test_what_cuda_does_not_pin_is_an_error(pages: StandInPages) -> None:
    pages.error = 2
    with pytest.raises(RuntimeError, match="cudaHostRegister failed with CUDA error 2"):
        GrowableHostBuffer().grow(1, pinned=True)
