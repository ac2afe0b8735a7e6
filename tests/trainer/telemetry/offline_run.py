"""Reading the `.wandb` file of an offline run, without wandb's server or its tools.

The file is a LevelDB log: a 7-byte file header, then blocks of 32 KiB. A record is cut into fragments, each with a
7-byte header: CRC-32 of type and data, length, type (full, first, middle, last). No fragment crosses a block; a block
tail too short for a header is zero. Each record is one protobuf `Record`. The format is wandb's own and private, so a
test reads what the installed wandb writes.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.comm.errors import ConfigError, Problem

_BLOCK = 32 * 1024
_FILE_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_FRAGMENT = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineRun:
    """The contents of an offline run's file."""

    run_id: str
    project: str
    config: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    """Rows in order. wandb adds `_step`, `_timestamp` and `_runtime`."""
    summary: dict[str, Any]
    alerts: tuple[tuple[str, str], ...]
    """Title and text."""


def read_offline_run(path: Path) -> OfflineRun:
    """Read the `.wandb` file at `path`. A partial last record ends it; a wrong CRC or header raises `ConfigError`."""
    # wandb's record type is defined under a version of protobuf that no type checker can follow.
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    run_id = project = ""
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    alerts: list[tuple[str, str]] = []
    for data in read_records(path):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id, project = record.run.run_id, record.run.project
            _put(config, record.run.config.update)
        elif kind == "config":
            _put(config, record.config.update)
        elif kind == "summary":
            _put(summary, record.summary.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _put(row, record.history.item)
            history.append(row)
        elif kind == "alert":
            alerts.append((record.alert.title, record.alert.text))
    return OfflineRun(run_id, project, config, tuple(history), summary, tuple(alerts))


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of the log at `path`, checking each CRC. Raises `ConfigError` for a damaged file."""
    data = path.read_bytes()
    if not data.startswith(_FILE_HEADER):
        raise ConfigError([Problem(str(path), data[:7], "not a .wandb file of version 0")])
    position, whole = len(_FILE_HEADER), b""
    while position + _FRAGMENT.size <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _FRAGMENT.size:
            position += room
            continue
        crc, length, kind = _FRAGMENT.unpack_from(data, position)
        start = position + _FRAGMENT.size
        if start + length > len(data):
            return
        fragment = data[start : start + length]
        if not _FULL <= kind <= _LAST or crc != zlib.crc32(fragment, zlib.crc32(bytes([kind]))):
            raise ConfigError([Problem(f"{path} at byte {position}", kind, "damaged: the CRC does not match")])
        whole = fragment if kind in (_FULL, _FIRST) else whole + fragment
        if kind in (_FULL, _LAST):
            yield whole
        position = start + length


def _put(target: dict[str, Any], items: Iterable[Any]) -> None:
    """Set each item of a protobuf record, key or nested key and JSON value, in `target`."""
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = target
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
