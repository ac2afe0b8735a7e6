"""Files of named tensors in the safetensors format, written and read one tensor at a time.

The format is eight bytes of length, a JSON header and the tensors' bytes. The library of that name writes a file from
tensors that are all in memory and maps a file as a whole; here neither ever holds more than one tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .direct_file import DirectFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 10**9


@dataclass(frozen=True)
class Declared:
    """A tensor that a file will hold, or holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """A new file that holds the declared tensors; use it as a context. On disk when the context ends without error."""

    def __init__(self, path: Path, declared: Iterable[Declared], metadata: Mapping[str, str] | None = None) -> None:
        self._declared = list(declared)
        self._header, self.begins = _header(self._declared, dict(metadata or {}))
        self._next = 0
        self._path = path

    def write(self, tensor: Tensor) -> None:
        """The next of the declared tensors."""
        expected = self._declared[self._next]
        assert (tensor.dtype, tuple(tensor.shape)) == (expected.dtype, expected.shape), expected.name
        self._file.write(as_bytes(tensor))
        self._next += 1

    def __enter__(self) -> TensorFileWriter:
        with ExitStack() as opening:
            self._file = opening.enter_context(DirectFile(self._path))
            self._file.write(self._header)  # of many tensors it is large, and the disk may be full
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        assert kind is not None or self._next == len(self._declared), f"{self._declared[self._next].name} is missing"


class TensorFile:
    """A file to read from. Raises `ValueError` for one that is no whole safetensors file, `OSError` for none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _LARGEST_HEADER):
                raise ValueError(f"{path}: is truncated, or no safetensors file")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._begins: dict[str, int] = {}
        self.tensors: dict[str, Declared] = {}
        end = 8 + length
        for name, entry in header.items():
            end = max(end, 8 + length + self._add(name, entry, 8 + length))
        if end != size:
            raise ValueError(f"{path}: has {size} bytes where its header describes {end}")

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        declared = self.tensors[name]
        return read_at(self.path, self._begins[name], declared.dtype, declared.shape)

    def _add(self, name: str, entry: Mapping[str, Any], data: int) -> int:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{self.path}: {name} has the unknown dtype {entry['dtype']}")
        declared = Declared(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != declared.bytes:
            raise ValueError(f"{self.path}: {name} has {end - begin} bytes where its shape asks for {declared.bytes}")
        self.tensors[name] = declared
        self._begins[name] = data + begin
        return int(end)


def read_at(path: Path, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose bytes begin there. Raises `ValueError` where the file ends too early."""
    raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        view = memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer
        while view:
            count = file.readinto(view)
            if not count:
                raise ValueError(f"{path}: ends {len(view)} bytes too early")
            view = view[count:]
    return raw.view(dtype).view(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; without a copy where it is contiguous."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)  # type: ignore[arg-type]  # numpy's stubs hide the buffer


def _header(declared: list[Declared], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file up to its first tensor, and where the bytes of each begin."""
    tree: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for each in declared:
        offsets[each.name] = end
        tree[each.name] = {
            "dtype": NAMES[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [end, end + each.bytes],
        }
        end += each.bytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begins = {name: 8 + len(text) + offset for name, offset in offsets.items()}
    return len(text).to_bytes(8, "little") + text, begins
