"""Files of named tensors in the safetensors format, written and read one tensor at a time.

The format is eight bytes of length, a JSON header and the tensors' bytes. The safetensors library needs all tensors in
memory to write a file and maps a whole file to read it; here reader and writer hold one tensor at most.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
from torch import Tensor

from ...comm.files.file_io import open_regular_file
from ...comm.files.strict_json import JsonValue, MalformedFileError, parse_json
from .direct_file import DirectIOFile

DTYPE_BY_NAME = {
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
NAME_BY_DTYPE = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}
_LARGEST_HEADER = 10**9
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """Writer of a new file with the declared tensors, as a context manager; on disk when the context ends."""

    def __init__(self, path: Path, declared: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self._declared = list(declared)
        self._header, self.byte_offsets = _header(self._declared, dict(metadata or {}))
        self._next = 0
        self._path = path

    def write_tensor(self, tensor: Tensor) -> None:
        """Write the next of the declared tensors."""
        expected = self._declared[self._next]
        assert (tensor.dtype, tuple(tensor.shape)) == (expected.dtype, expected.shape), expected.name
        self._file.write(tensor_as_bytes(tensor))
        self._next += 1

    def __enter__(self) -> "TensorFileWriter":
        with ExitStack() as opening:
            self._file = opening.enter_context(DirectIOFile(self._path))
            self._file.write(self._header)  # inside `opening`: the disk may be full
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        assert kind is not None or self._next == len(self._declared), f"{self._declared[self._next].name} is missing"


class TensorFile:
    """Reader of a file, whose header is checked as a whole when it is opened.

    Raises `OSError`, and `MalformedFileError` (a `ValueError`) for a header that is not strict JSON, an unsupported
    dtype, or offsets that overlap, leave a gap or pass the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise MalformedFileError("", size, "is truncated, or no safetensors file")
            header = parse_json(file.read(length))
        data = 8 + length
        placed = sorted(_placed(header), key=lambda each: each[1:])
        found = header.get(_METADATA)
        # The format restricts the metadata to strings.
        self.metadata = {} if found is None else {key: item.as_string() for key, item in found.items()}
        self.tensor_specs: dict[str, TensorSpec] = {declared.name: declared for declared, _, _ in placed}
        self.byte_offsets: dict[str, int] = {declared.name: data + begin for declared, begin, _ in placed}
        """First byte of each tensor in the file."""
        end = 0
        for declared, begin, stop in placed:
            if begin != end:
                hint = f"must begin at byte {end}, where the one before it ends"
                raise MalformedFileError(declared.name, [begin, stop], hint)
            end = stop
        if data + end != size:
            raise MalformedFileError("", size, f"has {size} bytes where its header describes {data + end}")

    def read_tensor(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        declared = self.tensor_specs[name]
        return read_tensor_at(self.path, self.byte_offsets[name], declared.dtype, declared.shape)


def _placed(header: JsonValue) -> Iterator[tuple[TensorSpec, int, int]]:
    """Yield each tensor with its first byte in the data and the byte after its last."""
    for name, entry in header.items():
        if name == _METADATA:
            continue
        read = entry.as_dataclass(_HeaderEntry)
        declared = TensorSpec(name, read.dtype, read.shape)
        if len(read.data_offsets) != 2:
            hint = "must be two numbers: the first byte and the one after the last"
            raise entry["data_offsets"].malformed_error(hint)
        begin, end = read.data_offsets
        if end - begin != declared.nbytes:
            kind = f"dtype {entry['dtype'].value} and shape {list(declared.shape)}"
            hint = f"{end - begin} bytes, where {kind} ask for {declared.nbytes}"
            raise entry["data_offsets"].malformed_error(hint)
        yield declared, begin, end


def parse_dtype(item: JsonValue) -> torch.dtype:
    """Return a dtype by its name in the format. Raises `MalformedFileError` for an unsupported one."""
    name = item.as_string()
    if name not in DTYPE_BY_NAME:
        raise item.malformed_error(f"is an unsupported dtype; supported: {', '.join(DTYPE_BY_NAME)}")
    return DTYPE_BY_NAME[name]


@dataclass(frozen=True)
class _HeaderEntry:
    dtype: Annotated[torch.dtype, parse_dtype]
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


def read_tensor_at(path: Path, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor whose bytes start at `begin`. Raises `ValueError` if the file ends too early."""
    size = math.prod(shape) * dtype.itemsize
    with open_regular_file(path) as file:
        # Checked before allocating: a damaged size may ask for more memory than any machine has.
        if begin + size > (file_size := os.fstat(file.fileno()).st_size):
            raise MalformedFileError("", file_size, f"ends {begin + size - file_size} bytes too early")
        raw = torch.empty(size, dtype=torch.uint8)
        file.seek(begin)
        view = memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer
        while view:
            count = file.readinto(view)
            if not count:
                raise MalformedFileError("", file_size, f"ends {len(view)} bytes too early")
            view = view[count:]
    return raw.view(dtype).view(shape)


def tensor_as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, without a copy if it is contiguous."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)  # type: ignore[arg-type]  # numpy's stubs hide the buffer


def _header(declared: list[TensorSpec], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the first tensor, and the byte offset of each tensor."""
    tree: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for each in declared:
        tree[each.name] = {
            "dtype": NAME_BY_DTYPE[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [end, end + each.nbytes],
        }
        end += each.nbytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begins = {each.name: 8 + len(text) + tree[each.name]["data_offsets"][0] for each in declared}
    return len(text).to_bytes(8, "little") + text, begins
