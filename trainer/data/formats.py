"""Documents of corpus files: plain text, JSON lines and Parquet, the first two also compressed with gzip or zstd."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from ...comm.errors import ConfigError, Problem
from .storage import StoredFile, open_binary, read_errors

TEXT_BYTES = 2**31
"""Largest file that is one document: it is in memory as a whole."""
LINE_BYTES = 2**27
"""Longest line: a document is in memory several times while it is encoded."""
_TEXT, _LINES, _PARQUET = (".txt",), (".jsonl", ".ndjson"), (".parquet",)
_COMPRESSED = (".gz", ".zst")
_MAX_SHOWN = 8
_FIX = "make it readable, or remove it from the corpus"


class ByteRange(NamedTuple):
    """Bytes `start` to `stop` (excluded) of a file."""

    start: int
    stop: int


class Document(NamedTuple):
    """One text of a file."""

    place: int
    """Place in the file: byte of the line (JSON lines), number of the line (compressed ones) or of the row, from 0."""
    text: str


@dataclass
class BadRecords:
    """Broken records so far, of which `limit` are allowed, and records without text."""

    limit: int
    count: int = 0
    empty: int = 0
    problems: list[Problem] = field(default_factory=list)
    """The first broken records."""

    def add(self, problem: Problem) -> None:
        """Count a broken record. Raises `ConfigError` with the first ones beyond the limit."""
        self.count += 1
        if len(self.problems) < _MAX_SHOWN:
            self.problems.append(problem)
        if self.count > self.limit:
            raise ConfigError(self.problems)


class _BrokenRecord(Exception):  # noqa: N818 -- counted, not an error of the run
    """A record that is no document; the text says why."""


def split_suffixes(name: str) -> tuple[str, str]:
    """Return the lower-case suffixes of a name for format and compression; empty if it has none that is read."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    return (suffixes[-1] if suffixes else ""), compression


def stem(name: str) -> str:
    """Return the name of a file without folder and without the suffixes of format and compression."""
    form, compression = split_suffixes(name)
    base = PurePosixPath(name).name
    return base[: len(base) - len(form) - len(compression)]


def is_readable(file: StoredFile) -> bool:
    """Return True if the file's suffixes name a format that is read; hidden files are not."""
    form, compression = split_suffixes(file.name)
    if any(part.startswith(".") for part in PurePosixPath(file.name).parts):
        return False
    return form in (*_TEXT, *_LINES) or (form in _PARQUET and not compression)


def is_cuttable(file: StoredFile) -> bool:
    """Return True for plain JSON lines, of which a piece can be read without the rest."""
    form, compression = split_suffixes(file.name)
    return form in _LINES and not compression


def describe_ignored(files: Sequence[StoredFile], place: str) -> str | None:
    """Return a line about files that are not read; None if there are none."""
    if not files:
        return None
    more = f", and {len(files) - _MAX_SHOWN} more" if len(files) > _MAX_SHOWN else ""
    shown = ", ".join(ascii(file.name)[1:-1] for file in files[:_MAX_SHOWN])
    count = "1 file was" if len(files) == 1 else f"{len(files)} files were"
    return f"{count} not read: {shown}{more}. In {place}, *.txt, *.jsonl (also .gz, .zst) and *.parquet are read."


def read_documents(file: StoredFile, text_key: str, part: ByteRange | None, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of `file`, exactly as written; those of plain JSON lines that start inside `part`.

    Records without text are counted in `bad` and left out, and so are broken ones up to its limit. Raises `ConfigError`
    beyond it, and for a file that cannot be read to its end.
    """
    form, _ = split_suffixes(file.name)
    readers = {_PARQUET[0]: _read_parquet, _TEXT[0]: _read_text} | dict.fromkeys(_LINES, _read_lines)
    for document in readers[form](file, text_key, part, bad):
        if not document.text or document.text.isspace():
            bad.empty += 1
        else:
            yield document


def _read_text(file: StoredFile, text_key: str, part: ByteRange | None, bad: BadRecords) -> Iterator[Document]:
    with _open(file) as stream, _damaged_file_errors(file):
        raw = stream.read(TEXT_BYTES + 1)
    if len(raw) > TEXT_BYTES:
        hint = f"is one document of more than {TEXT_BYTES} bytes; cut it, or write its documents as *.jsonl"
        raise ConfigError([Problem(file.url, file.bytes, hint)])
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        bad.add(Problem(file.url, f"byte {error.start}", "is not UTF-8; convert the file"))
        return
    yield Document(0, text)


def _read_lines(file: StoredFile, text_key: str, part: ByteRange | None, bad: BadRecords) -> Iterator[Document]:
    is_plain = is_cuttable(file)
    with _open(file) as stream, _damaged_file_errors(file):
        place = number = 0
        if part is not None and part.start > 0:
            # A line that starts before the piece belongs to the piece before, also if it ends exactly here.
            stream.seek(part.start - 1)
            place = part.start - 1 + sum(len(rest) for rest in _rest_of_line(stream))
        while part is None or place < part.stop:
            line = stream.readline(LINE_BYTES + 1)
            if not line:
                return
            start, size = (place if is_plain else number), len(line)
            try:
                if size > LINE_BYTES:
                    size += sum(len(rest) for rest in _rest_of_line(stream))
                    raise _BrokenRecord(f"is longer than {LINE_BYTES} bytes; cut the document")
                yield Document(start, _text_of_line(line, text_key))
            except _BrokenRecord as broken:
                before = _count_lines(file, part.start) if part is not None else 0
                bad.add(Problem(file.url, f"line {before + number + 1}", str(broken)))
            place, number = place + size, number + 1


def _rest_of_line(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.readline(2**20):
        yield chunk
        if chunk.endswith(b"\n"):
            return


def _count_lines(file: StoredFile, stop: int) -> int:
    """Return the number of lines that start before byte `stop`."""
    with _open(file) as stream:
        lines, ends = 0, True
        while stop > 0 and (chunk := stream.read(min(2**22, stop))):
            lines, ends, stop = lines + chunk.count(b"\n"), chunk.endswith(b"\n"), stop - len(chunk)
    return lines if ends else lines + 1


def _text_of_line(line: bytes, text_key: str) -> str:
    if line.isspace():
        return ""
    try:
        record = json.loads(line, object_pairs_hook=_pairs)
    except UnicodeDecodeError as error:
        raise _BrokenRecord(f"is not UTF-8 at byte {error.start}; convert the file") from error
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise _BrokenRecord(f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise _BrokenRecord(f'must be an object with a string under the key "{text_key}"')
    text = record.get(text_key)
    if text_key in record and text is None:
        return ""
    if not isinstance(text, str):
        keys = ", ".join(map(str, list(record)[:_MAX_SHOWN]))
        raise _BrokenRecord(f'must have a string under the key "{text_key}" (data.text_key); its keys are {keys}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BrokenRecord("holds half of a surrogate pair, which is no character") from error
    return text


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key occurs twice")
    return tree


def _read_parquet(file: StoredFile, text_key: str, part: ByteRange | None, bad: BadRecords) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with _open(file) as stream, _damaged_file_errors(file, (pyarrow.ArrowException,)):
        table = pyarrow.parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        if text_key not in names:
            hint = f"is not a column of the file, which has {', '.join(names[:_MAX_SHOWN])}; set data.text_key"
            raise ConfigError([Problem(f"{file.url}: {text_key}", None, hint)])
        if names.count(text_key) > 1:
            raise ConfigError([Problem(f"{file.url}: {text_key}", None, "is the name of several columns; rename one")])
        kind = table.schema_arrow.field(text_key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            hint = f"is a column of {kind}, and text is needed; set data.text_key"
            raise ConfigError([Problem(f"{file.url}: {text_key}", None, hint)])
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            for value in batch.column(0):
                try:
                    text = value.as_py() or ""
                except UnicodeDecodeError as error:
                    bad.add(Problem(file.url, f"row {row + 1}", f"is not UTF-8 at byte {error.start}"))
                else:
                    yield Document(row, text)
                row += 1


@contextmanager
def _open(file: StoredFile) -> Iterator[IO[bytes]]:
    compression = split_suffixes(file.name)[1]
    with open_binary(file.url) as raw:
        if not compression:
            yield raw
            return
        if file.bytes == 0:
            raise ConfigError([Problem(file.url, 0, f"is damaged or truncated: it has no byte; {_FIX}")])
        import pyarrow  # unlike zstandard's reader, its streams notice a file that was cut short

        name = {".gz": "gzip", ".zst": "zstd"}[compression]
        with io.BufferedReader(pyarrow.CompressedInputStream(raw, name), 2**20) as stream:
            yield stream


@contextmanager
def _damaged_file_errors(file: StoredFile, damaged: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn the errors of a file that cannot be read to its end into a `ConfigError`."""
    with read_errors(file.url):
        try:
            yield
        except (OSError, *damaged) as error:  # type: ignore[misc]  # a tuple of classes
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk, not of the content
            hint = f"is damaged or truncated ({error}); {_FIX}"
            raise ConfigError([Problem(file.url, file.bytes, hint)]) from error
