"""Operations on the rehearsed device and what they count as: launches, bytes, memory and waits, without a model.

The shim must be there before torch, and would make every other test see a GPU: `test_device.py` runs these alone.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shoestring.launch.rehearsal.device.fake_device import FakeDeviceMode
from shoestring.launch.rehearsal.device.patches import patch_triton_and_threads
from shoestring.launch.rehearsal.device.recorder import RankRecorder
from shoestring.launch.rehearsal.device.spans import RehearsalSpanRecorder
from shoestring.launch.rehearsal.log import HostWait

N = 1000


class Sevens:
    def read(self, tensor: Tensor) -> Tensor:
        return torch.full(tensor.shape, 7, dtype=tensor.dtype)


@pytest.fixture
def ledger() -> Iterator[RankRecorder]:
    """Make `cuda` the rehearsed device inside."""
    ledger = RankRecorder(RehearsalSpanRecorder("test"))
    device = FakeDeviceMode(ledger, Sevens())
    with patch_triton_and_threads(device), device:
        yield ledger


def launched(ledger: RankRecorder) -> dict[str, tuple[int, int]]:
    """Return launches and bytes by operation since the last call."""
    found = {row.operation: (row.launches, row.bytes) for row in ledger.launches}
    ledger.begin_step()
    return found


def on_device(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda")


def waits(ledger: RankRecorder) -> list[str]:
    return [event.reason for event in ledger.events if isinstance(event, HostWait)]


def test_each_tensor_is_counted_once(ledger: RankRecorder) -> None:
    x, y = on_device(N), on_device(N)
    assert launched(ledger) == {}
    for _ in range(2):  # the second time from memory
        x + y
        x * x
        x * x.view(N)
        x.add_(y)
        assert launched(ledger) == {"add": (1, 12 * N), "mul": (2, 16 * N), "add_": (1, 8 * N)}


def test_an_expanded_dimension_is_read_once(ledger: RankRecorder) -> None:
    x, y = on_device(N, 1), on_device(N, 8)
    assert x.expand(N, 8).clone().shape == (N, 8)
    y += x
    assert launched(ledger) == {"clone": (1, 4 * N + 32 * N), "add_": (1, 32 * N + 4 * N)}


def test_views_are_free(ledger: RankRecorder) -> None:
    for _ in range(2):
        x = on_device(N, 8)
        parts = x.view(8, N).T.split(10)[3], *x.unbind(1)[:2], x[5:], x.detach(), torch.empty_like(x)
        assert [part.storage_offset() for part in parts] == [30, 0, 1, 40, 0, 0]
        assert x[5:].untyped_storage()._cdata == x.untyped_storage()._cdata
        assert launched(ledger) == {}
        x[5:].zero_()
        assert launched(ledger) == {"zero_": (1, 4 * 8 * (N - 5))}


def test_what_changes_its_argument_is_not_remembered(ledger: RankRecorder) -> None:
    for _ in range(2):
        x = on_device(2, 3)
        assert x.t_().shape == (3, 2)
        assert x.unsqueeze_(0).shape == (1, 3, 2)


def test_memory_is_that_of_storages(ledger: RankRecorder) -> None:
    memory = ledger.memory
    x = on_device(N)
    part = x[:10]
    del x
    assert memory.live_bytes == 4 * N
    both = part + 1
    assert memory.live_bytes == 4 * N + 40
    del part, both
    assert memory.live_bytes == 0
    assert memory.peak_bytes == 4 * N + 40


def test_the_host_reads_what_the_readback_says(ledger: RankRecorder) -> None:
    x = torch.zeros(3, dtype=torch.int64, device="cuda")
    assert x.cpu().tolist() == [7, 7, 7]
    assert int(x[0]) == 7
    assert waits(ledger) == ["read", "read"]
    pinned = torch.empty(3, dtype=torch.int64, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    assert pinned.split([1, 2])[1].tolist() == [7, 7]
    assert len(waits(ledger)) == 2
    assert pinned.copy_(x).sum() == 21
    assert waits(ledger) == ["read", "read", "read"]


def test_pinned_memory_goes_to_the_device_without_a_wait(ledger: RankRecorder) -> None:
    numbers = torch.tensor([1, 2, 3])
    assert numbers.pin_memory().to("cuda", non_blocking=True).device.type == "cuda"
    assert waits(ledger) == []
    assert launched(ledger) == {"copy to device": (1, 24)}
    numbers.to("cuda")
    assert waits(ledger) == ["synchronize"]
    huge = torch.zeros(2**20, dtype=torch.int64, pin_memory=True).pin_memory()
    assert huge.to("cuda", non_blocking=True).shape == (2**20,)
    assert len(waits(ledger)) == 1


def test_the_host_computes_for_real(ledger: RankRecorder) -> None:
    assert torch.tensor([1, 2, 3]).cumsum(0).tolist() == [1, 3, 6]
    assert launched(ledger) == {}
    huge = torch.randn(2**20, generator=torch.Generator().manual_seed(0))  # never read
    on_device(2**20).copy_(huge.mul_(2))
    assert launched(ledger) == {"copy to device": (1, 4 * 2**20)}


def test_a_tensor_of_the_host_among_those_of_the_device(ledger: RankRecorder) -> None:
    x = on_device(N)
    assert (x + torch.ones(())).device.type == "cuda"
    assert (x * torch.tensor(2.0)).device.type == "cuda"
    assert not ledger.findings
    assert (x + torch.ones(N)).device.type == "cuda"
    assert [finding.kind for finding in ledger.findings] == ["device"]
    assert ledger.findings[0].text == "add takes a float32 host tensor [1000] together with device tensors"


def test_shapes_that_do_not_fit_are_an_error(ledger: RankRecorder) -> None:
    with pytest.raises(RuntimeError, match="broadcast a dimension of length 4"):
        on_device(3) + on_device(4)
    with pytest.raises(RuntimeError, match=r"mm\.default takes torch\.float32 and torch\.bfloat16"):
        on_device(3, 3) @ on_device(3, 3).bfloat16()


def test_a_backward_runs_on_the_device(ledger: RankRecorder) -> None:
    x, w = on_device(8, 16).requires_grad_(), on_device(4, 16)
    (x @ w.T).sum().backward()
    assert x.grad is not None
    assert x.grad.device.type == "cuda"
    assert launched(ledger)["mm"] == (2, 4 * (2 * 8 * 16 + 2 * 4 * 16 + 2 * 8 * 4 - 8 * 4 + 1))
