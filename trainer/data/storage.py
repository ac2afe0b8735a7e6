"""Files on disk and in object storage: one module over fsspec, by path or URL (`file://`, `s3://`, `gs://`).

Keys and endpoints come from the environment, as s3fs and gcsfs document. Paths on disk do not go through fsspec: FIFOs
and devices are refused as everywhere. `gs://` has not been run against a real bucket.
"""

import errno
import glob
import hashlib
import io
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import config_error_context, open_regular_file

if TYPE_CHECKING:
    import fsspec

_FIX = "make it readable, or remove it from the corpus"
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""Package that brings the file system of a protocol."""
_STORE_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "asyncio")
"""Libraries that raise their own kinds of errors for missing keys and networks."""
_CHUNK_BYTES = 2**22
_PATTERN = "*?["
"""Characters of a glob."""


@dataclass(frozen=True)
class StoredFile:
    """A file as it was listed."""

    url: str
    """Path or URL."""
    name: str
    """Path relative to the listed folder, with `/`."""
    bytes: int
    signature: str
    """Text that changes when the content does: size and modification time, or the store's checksum."""


def is_url(place: str) -> bool:
    """Return True for a place that is reached through fsspec; `file://` is a path."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """Return the path of a place on disk."""
    return Path(place.removeprefix("file://"))


def list_files(place: str) -> list[StoredFile]:
    """Return the files of a file, of a folder with all folders below, or of a glob such as `texts/**/*.jsonl`, by name.

    Raises `ConfigError` for a place that does not exist, with each broken link and each name that is not UTF-8, and for
    a store that cannot be used.
    """
    found = _list_remote(place) if is_url(place) else _list_local(place)
    return sorted(found, key=lambda file: file.name)


def open_binary(url: str, field: str = "data.corpus") -> IO[bytes]:
    """Open a file for reading. Raises `ConfigError` if it is gone or cannot be read."""
    if not is_url(url):
        with config_error_context(url, _FIX):
            return open_regular_file(local_path(url))
    with _store_errors(url, field):
        # Buffered again: the files of fsspec read lines of any length at once.
        return io.BufferedReader(_file_system(url).open(url, "rb"), 2**20)


def hash_stored_file(file: StoredFile, start: int, size: int) -> str:
    """Return the SHA-256 of `size` bytes of a file from `start`, hexadecimal. Raises `ConfigError`."""
    digest = hashlib.sha256()
    with open_binary(file.url) as stream, read_errors(file.url):
        stream.seek(start)
        while size > 0 and (chunk := stream.read(min(_CHUNK_BYTES, size))):
            digest.update(chunk)
            size -= len(chunk)
    if size > 0:
        raise ConfigError([Problem(file.url, file.bytes, "has become shorter since it was listed; start again")])
    return digest.hexdigest()


@contextmanager
def read_errors(url: str) -> Iterator[None]:
    """Turn what reading an open file may raise into a `ConfigError` that names it."""
    if is_url(url):
        with _store_errors(url, "data.corpus"):
            yield
    else:
        with config_error_context(url, _FIX):
            yield


def _list_local(place: str) -> Iterator[StoredFile]:
    root = local_path(place)
    if any(character in place for character in _PATTERN) and not root.exists():
        matches = [Path(path) for path in glob.glob(str(root), recursive=True)]  # noqa: PTH207 -- takes absolute ones
        paths = sorted({file for match in matches for file in (_walk(match) if match.is_dir() else (match,))})
        if not paths:
            raise ConfigError([Problem("data.corpus", place, "matches no file")])
        root = Path(os.path.commonpath([pattern_free_part(place), *(path.parent for path in paths)]))
    elif root.is_dir():
        paths = list(_walk(root))
    elif root.exists():
        paths, root = [root], root.parent
    else:
        raise ConfigError([Problem("data.corpus", place, "does not exist: name a file, a folder or a glob")])
    problems = [problem for path in paths for problem in _entry_problems(path)]
    raise_if_any(problems)
    for path in sorted(paths):
        if not path.is_dir():
            status = path.stat()
            name = path.relative_to(root).as_posix()
            yield StoredFile(str(path), name, status.st_size, f"{status.st_size} {status.st_mtime_ns}")


def pattern_free_part(place: str) -> Path:
    """Return the folders of a place on disk before the first with a pattern: those of its files, or itself."""
    path = local_path(place)
    for number, part in enumerate(path.parts):
        if any(character in part for character in _PATTERN) and not path.exists():
            return Path(*path.parts[:number])
    return path


def current_signature(file: StoredFile) -> str:
    """Return the signature that the file has now. Raises `ConfigError` if it is gone."""
    if not is_url(file.url):
        with config_error_context(file.url, _FIX):
            status = local_path(file.url).stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    return next(_list_remote(file.url)).signature  # stores tell other facts about a file that is not listed


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ConfigError([Problem(str(error.filename), None, f"cannot be listed: {error.strerror}; {_FIX}")])

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        folders.sort()
        yield from (Path(folder) / name for name in names)


def _entry_problems(path: Path) -> Iterator[Problem]:
    # A broken link may be a disk that is not mounted; skipping it would train on other data.
    if path.is_symlink() and not path.exists():
        yield Problem(str(path), str(path.readlink()), "is a broken link; mount its disk, or remove it")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        yield Problem(ascii(str(path)), None, "has a name that is not UTF-8; rename the file")


def _list_remote(place: str) -> Iterator[StoredFile]:
    with _store_errors(place, "data.corpus"):
        system = _file_system(place)
        is_pattern = any(character in place for character in _PATTERN)
        found: dict[str, dict[str, Any]]
        found = system.glob(place, detail=True) if is_pattern else system.find(place, detail=True)
        root = system._strip_protocol(place)
    if not found:
        raise ConfigError([Problem("data.corpus", place, "holds no file: name a file, a folder or a glob")])
    first = min((root.index(character) for character in _PATTERN if character in root), default=len(root))
    prefix = posixpath.dirname(root[:first]) if is_pattern else root
    for path, info in found.items():
        if info.get("type") == "file":
            name = posixpath.relpath(path, prefix) if path != prefix else posixpath.basename(path)
            yield StoredFile(system.unstrip_protocol(path), name, int(info["size"]), _signature(info))


def _signature(info: dict[str, Any]) -> str:
    # Stores quote the tag in one answer and not in another, and give fractions of a second in one only.
    mark = next((info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if key in info), "")
    text = str(int(mark.timestamp())) if isinstance(mark, datetime) else str(mark).strip('"')
    return f"{info['size']} {text}"


def _file_system(url: str) -> "fsspec.AbstractFileSystem":
    import fsspec

    protocol = url.split("://", 1)[0]
    try:
        # Listings are not kept: a file that was added since must be seen.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        hint = f"needs a package that is not installed ({error}); pip install {package}"
        raise ConfigError([Problem("data.corpus", url, hint if package else str(error))]) from error
    except ValueError as error:
        raise ConfigError([Problem("data.corpus", url, f"{error}; use a path, s3:// or gs://")]) from error


@contextmanager
def _store_errors(url: str, field: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError([Problem(field, url, "does not exist in the store; check bucket and name")]) from error
    except PermissionError as error:
        hint = f"is refused by the store ({error}); check the keys in the environment"
        raise ConfigError([Problem(field, url, hint)]) from error
    except OSError as error:
        words = os.strerror(error.errno) if error.errno in (errno.EIO, errno.ETIMEDOUT) else str(error)
        raise ConfigError([Problem(field, url, f"cannot be read from the store: {words}; try again")]) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _STORE_LIBRARIES:
            raise
        raise ConfigError([Problem(field, url, f"cannot be read: {type(error).__name__}: {error}")]) from error
