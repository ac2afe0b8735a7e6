"""Tensors that a thread reads during training: the bits, the order of copies and waits, and the memory between."""

import pytest
import torch

from shoestring.comm.host_transfer import DoubleBufferedReader
from shoestring.tests.comm.late_streams import LateStreams

STAGED = 2 * 16 * 8  # bytes: two halves of sixteen FP64


@pytest.mark.parametrize("late", [False, True], ids=["at once", "as late as may be"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 16, 100, 1000])
def test_every_element_comes_once(late: bool, dtype: torch.dtype, length: int) -> None:
    source_N = torch.rand(length).to(dtype)
    reader = DoubleBufferedReader(LateStreams(late), "average", pinned=False, staging_bytes=STAGED)
    read_N, most = torch.full_like(source_N, torch.nan), 0
    for part, host_n in reader.iter_host_slices(source_N, reader.record_event()):
        assert bool(read_N[part].isnan().all())
        read_N[part] = host_n
        most = max(most, host_n.nbytes)
    assert torch.equal(read_N, source_N)
    assert most <= STAGED // 2


def test_the_next_piece_is_on_its_way_while_the_caller_works() -> None:
    streams = LateStreams()
    reader = DoubleBufferedReader(streams, "average", pinned=False, staging_bytes=STAGED)
    source_N = torch.arange(40.0, dtype=torch.float64)  # three pieces
    for part, _ in reader.iter_host_slices(source_N, reader.record_event()):
        streams.log.append(f"caller has {part.start}")
    assert streams.log == [
        "computing 1",
        "average waits for computing 1",
        "average 1",
        "average 2",
        "host waits for average 1",
        "caller has 0",
        "average 3",  # into the half of the first piece
        "host waits for average 2",
        "caller has 16",
        "host waits for average 3",
        "caller has 32",
    ]
