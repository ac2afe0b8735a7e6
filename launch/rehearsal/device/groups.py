"""Process groups of a rehearsed rank: communicators that log their calls, on torch's `fake` backend."""

import sys
from collections.abc import Sequence
from types import FrameType

import torch.distributed as dist
from torch import Tensor

from ....comm.communicator import Collectives, PeerTensors
from ..log import P2POpRecord
from .fake_device import is_fake_device_tensor
from .recorder import RankRecorder, TensorKey

_GROUPS = "comm/groups.py"


class LoggedGroupFactory:
    """Group factory (`comm.group_factory`) that counts creations as NCCL's does and creates only this rank's groups."""

    def __init__(self, rank: int, recorder: RankRecorder) -> None:
        self.creation_calls = 1
        self._rank, self._recorder = rank, recorder

    def create_world_cpu(self, ranks: tuple[int, ...], world: Collectives | None) -> Collectives:
        """See `GroupFactory`."""
        self.creation_calls += 1
        return LoggedCommunicator("control", ranks, self._recorder, on_device=False)

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """See `GroupFactory`."""
        self.creation_calls += 1
        own = next((ranks for ranks in parts if self._rank in ranks), None)
        return None if own is None else LoggedCommunicator(name, own, self._recorder)


class LoggedCommunicator(Collectives):
    """Communicator of GPUs that checks and logs each operation first."""

    def __init__(self, name: str, ranks: tuple[int, ...], recorder: RankRecorder, *, on_device: bool = True) -> None:
        process_group = dist.new_group(list(ranks), backend="fake")
        assert isinstance(process_group, dist.ProcessGroup)
        super().__init__(process_group)
        self._group = name, ranks
        self._recorder, self._on_device = recorder, on_device

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """See `Collectives`."""
        what = self._check_tensors("all_reduce", tensor)
        self._recorder.record_collective(self._group, "all_reduce", what, _described(tensor))
        super().all_reduce(tensor, operation)

    def all_to_all(self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int]) -> None:
        """See `Collectives`."""
        what = self._check_tensors("all_to_all", arrived, sent)
        _require(what, arrived.shape[1:] == sent.shape[1:], f"rows of {arrived.shape[1:]} and of {sent.shape[1:]}")
        for rows_M, tensor in ((received_M, arrived), (sent_M, sent)):
            _require(what, len(rows_M) == len(self._group[1]), f"{len(rows_M)} sizes for {len(self._group[1])} ranks")
            _require(what, sum(rows_M) == len(tensor), f"sizes of {sum(rows_M)} rows for a tensor of {len(tensor)}")
        row, counts = (tuple(sent.shape[1:]), _dtype(sent)), (tuple(sent_M), tuple(received_M))
        self._recorder.record_collective(self._group, "all_to_all", what, row, counts)
        super().all_to_all(arrived, sent, received_M, sent_M)

    def reduce_scatter(self, own_N: Tensor, shards_GN: Tensor) -> None:
        """See `Collectives`."""
        self._record_shards("reduce_scatter", own_N, shards_GN)
        super().reduce_scatter(own_N, shards_GN)

    def all_gather(self, shards_GN: Tensor, own_N: Tensor) -> None:
        """See `Collectives`."""
        self._record_shards("all_gather", own_N, shards_GN)
        super().all_gather(shards_GN, own_N)

    def send_and_receive(self, sends: PeerTensors, receives: PeerTensors) -> None:
        """See `Collectives`."""
        what = self._check_tensors("send_and_receive", *(tensor for tensor, _ in (*sends, *receives)))
        names = what.split("; ")
        if len(names) != len(sends) + len(receives):
            names = [what] * (len(sends) + len(receives))
        messages = [
            P2POpRecord(name, peer, *_described(tensor))
            for name, (tensor, peer) in zip(names, (*sends, *receives), strict=True)
        ]
        for message in messages:
            _require(message.purpose, message.peer in self._group[1], f"rank {message.peer} is not in {self._group[0]}")
        self._recorder.record_p2p_batch(self._group, messages[: len(sends)], messages[len(sends) :])
        super().send_and_receive(sends, receives)

    def _record_shards(self, operation: str, own_N: Tensor, shards_GN: Tensor) -> None:
        what = self._check_tensors(operation, own_N, shards_GN)
        expected = len(self._group[1]) * own_N.numel()
        _require(what, shards_GN.numel() == expected, f"{shards_GN.numel()} elements for shards of {own_N.numel()}")
        self._recorder.record_collective(self._group, operation, what, _described(shards_GN))

    def _check_tensors(self, operation: str, *tensors: Tensor) -> str:
        """Check the tensors of an operation; return the purpose that its caller gave."""
        what = _purpose(sys._getframe(2)) or self._recorder.spans.innermost_span_name
        for tensor in tensors:
            _require(what, tensor.dtype == tensors[0].dtype, f"dtypes {tensors[0].dtype} and {tensor.dtype}")
            _require(what, tensor.is_contiguous(), f"a non-contiguous tensor, strides {tensor.stride()}")
            if is_fake_device_tensor(tensor) != self._on_device:
                side, library = ("host", "NCCL") if self._on_device else ("device", "gloo")
                takes = f"takes a {side} tensor, which {library} does not accept"
                self._recorder.record_finding("device", f"{operation} over {self._group[0]} ({what}) {takes}")
        return what


def _purpose(frame: FrameType | None) -> str | None:
    """Return the `what` that `Group` was called with, which it does not pass to the communicator."""
    for _ in range(3):
        if frame is None:
            return None
        if frame.f_code.co_filename.endswith(_GROUPS) and "what" in frame.f_locals:
            return str(frame.f_locals["what"])
        frame = frame.f_back
    return None


def _require(what: str, is_right: bool, wrong: str) -> None:
    if not is_right:
        raise ValueError(f"{what}: {wrong}")


def _described(tensor: Tensor) -> TensorKey:
    return tuple(tensor.shape), _dtype(tensor)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
