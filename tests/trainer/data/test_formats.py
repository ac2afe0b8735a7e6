"""Documents of each format: exactly as written, or one clear error that names file and place."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.data import formats
from shoestring.trainer.data.formats import (
    BadRecords,
    ByteRange,
    Document,
    describe_ignored,
    is_cuttable,
    is_readable,
    read_documents,
    stem,
)
from shoestring.trainer.data.storage import StoredFile, list_files

TEXTS = ["one", "two\nlines\r\n", "naïve 🙂\u2028", " blanks at both ends ", "end"]


def stored(path: Path) -> StoredFile:
    (file,) = list_files(str(path))
    return file


def write(path: Path, raw: bytes) -> StoredFile:
    if path.suffix.lower() in (".gz", ".zst"):
        raw = pyarrow.compress(raw, {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()], asbytes=True)
    path.write_bytes(raw)
    return stored(path)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> StoredFile:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return stored(path)


def lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def read(file: StoredFile, key: str = "text", part: ByteRange | None = None, limit: int = 0) -> list[Document]:
    return list(read_documents(file, key, part, BadRecords(limit)))


def refusal(file: StoredFile, key: str = "text", part: ByteRange | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(file, key, part)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".jsonl.gz", ".JsonL.GZ", ".jsonl.zst"])
def test_json_lines_in_every_compression(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a{suffix}", lines(TEXTS, "content"))
    assert is_readable(file)
    assert [document.text for document in read(file, "content")] == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    text = "".join(TEXTS)
    assert read(write(tmp_path / f"a{suffix}", text.encode())) == [Document(0, text)]


def test_parquet_reads_the_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"n": range(5), "body": TEXTS}, row_group_size=2)
    assert read(file, "body") == [Document(row, text) for row, text in enumerate(TEXTS)]
    encoded = write_parquet(tmp_path / "b.parquet", {"body": pyarrow.array(TEXTS).dictionary_encode()})
    assert read(encoded, "body") == read(file, "body")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_compressed_streams_in_a_file_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    pieces = []
    for text in TEXTS:
        write(path, lines([text]))
        pieces.append(path.read_bytes())
    path.write_bytes(b"".join(pieces))
    assert [document.text for document in read(stored(path))] == TEXTS


def test_pieces_of_any_cut_are_the_whole(tmp_path: Path) -> None:
    random_ = random.Random(0)
    texts = ["x" * random_.randrange(1, 40) for _ in range(30)]
    for raw in (lines(texts), lines(texts)[:-1], lines(texts).replace(b"\n", b"\r\n"), b""):
        file = write(tmp_path / "a.jsonl", raw)
        whole = read(file)
        assert [raw[place : place + 1] for place, _ in whole] == [b"{"] * len(whole)
        for _ in range(20):
            cuts = sorted({0, len(raw), *(random_.randrange(len(raw) + 1) for _ in range(4))})
            parts = [ByteRange(a, b) for a, b in pairwise(cuts)]
            assert [document for part in parts for document in read(file, part=part)] == whole


def test_every_byte_as_a_cut(tmp_path: Path) -> None:
    raw = lines(["a", "bc", "d"])
    file = write(tmp_path / "a.jsonl", raw)
    for cut in range(len(raw) + 1):
        found = read(file, part=ByteRange(0, cut)) + read(file, part=ByteRange(cut, len(raw)))
        assert [document.text for document in found] == ["a", "bc", "d"]


@pytest.mark.parametrize(
    ("line", "gist"),
    [
        (b"{", "is not JSON"),
        (b'{"text": "a", "text": "b"}', "a key occurs twice"),
        (b"[" * 90_000, "is not JSON"),
        (b'"text"', 'must be an object with a string under the key "text"'),
        (b'{"content": "a", "id": 1}', 'under the key "text" (data.text_key); its keys are content, id'),
        (b'{"text": 5}', "must have a string"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, line: bytes, gist: str, suffix: str) -> None:
    raw = lines(["good", "good too"]) + line + b"\n" + lines(["last"])
    file = write(tmp_path / f"a{suffix}", raw)
    assert f"a{suffix} = 'line 3': " in (message := refusal(file))
    assert gist in message
    bad = BadRecords(1)
    assert [document.text for document in read_documents(file, "text", None, bad)] == ["good", "good too", "last"]
    assert (bad.count, len(bad.problems)) == (1, 1)


def test_a_broken_record_of_a_piece_is_named_by_its_line_in_the_file(tmp_path: Path) -> None:
    raw = lines(["a", "b"]) + b"{\n" + lines(["c"])
    file = write(tmp_path / "a.jsonl", raw)
    start = len(lines(["a"]))
    for part in (ByteRange(start, len(raw)), ByteRange(start - 2, len(raw)), ByteRange(0, len(raw))):
        assert "= 'line 3'" in refusal(file, part=part)


def test_records_without_text_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines(["a", "", " \n\t", "b"]) + b'{"text": null}\n \n\n')
    bad = BadRecords(0)
    assert [document.text for document in read_documents(file, "text", None, bad)] == ["a", "b"]
    assert (bad.empty, bad.count) == (5, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_that_is_too_long_is_not_held_in_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LINE_BYTES", 100)
    raw = lines(["a"]) + lines(["x" * 1000]) + lines(["b"])
    file = write(tmp_path / f"a{suffix}", raw)
    assert "= 'line 2': is longer than 100 bytes" in refusal(file)
    assert [document.text for document in read(file, limit=1)] == ["a", "b"]


def test_a_text_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "TEXT_BYTES", 100)
    assert "is one document of more than 100 bytes" in refusal(write(tmp_path / "a.txt", b"x" * 101))


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    assert "a.txt = 'byte 2': is not UTF-8" in refusal(write(tmp_path / "a.txt", "naïve".encode("latin-1")))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "other bytes", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(path, {"text": TEXTS * 1000})
    else:
        write(path, lines([random.Random(0).randbytes(50_000).hex()] * 2))
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[: len(raw) // 2], "other bytes": b"no such format" * 50, "empty": b""}[damage])
    message = refusal(stored(path))
    assert f"a{suffix} = " in message
    assert "is damaged or truncated" in message


def test_a_parquet_file_without_the_column_or_with_numbers_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"n": range(5), "body": TEXTS})
    assert "is not a column of the file, which has n, body; set data.text_key" in refusal(file)
    assert "is a column of int64, and text is needed" in refusal(file, "n")
    table = pyarrow.Table.from_arrays([pyarrow.array(TEXTS)] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert "is the name of several columns" in refusal(stored(tmp_path / "b.parquet"))


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines(TEXTS))
    (tmp_path / "a.jsonl").unlink()
    assert "a.jsonl" in (message := refusal(file))
    assert "No such file" in message


def test_what_is_read_is_told_by_the_name() -> None:
    def named(name: str) -> StoredFile:
        return StoredFile(name, name, 1, "")

    unread = [named(name) for name in ("a.md", "a.parquet.gz", "a.jsonl.bz2", "a.gz", "a", ".a.txt", ".git/a.txt")]
    assert [is_readable(file) for file in unread] == [False] * len(unread)
    assert [is_cuttable(named(name)) for name in ("a.jsonl", "a.jsonl.gz", "a.txt")] == [True, False, False]
    assert [stem(name) for name in ("x/a.b.jsonl.gz", "a.parquet", "a.TXT")] == ["a.b", "a", "a"]
    assert describe_ignored([], "there") is None
    assert "7 files were not read: a.md, a.parquet.gz" in str(describe_ignored(unread, "there"))
    assert "and 1 more" in str(describe_ignored([*unread, *unread[:2]], "there"))
