"""The journal: appended records stay, changes are detected, and a torn record is cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.ledger.small_ledger import read_journal
from shoestring.trainer.ledger.journal import JournalReader, JournalWriter, contains_any

WRITER = """
import sys
from pathlib import Path
from shoestring.trainer.ledger.journal import JournalWriter
journal = JournalWriter(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    journal.append({"number": number, "filler": "x" * 3000})
    print(number, flush=True)
"""


def fill(path: Path, *numbers: int) -> None:
    journal = JournalWriter(path)
    for number in numbers:
        journal.append({"number": number})
    journal.close()


def numbers(path: Path) -> list[int]:
    return [record["number"] for record in read_journal(path)]


def new_numbers(reader: JournalReader) -> list[int]:
    return [json.loads(line)["number"] for line in reader.stream_lines()]


def test_records_are_chained_over_several_writers(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "work.jsonl"
    assert read_journal(path) == []
    fill(path, 1, 2)
    fill(path, 3)
    assert numbers(path) == [1, 2, 3]
    assert len({record["hash"] for record in read_journal(path)}) == 3


def test_a_line_torn_anywhere_is_left_out_and_cut_on_reopen(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    fill(path, 1, 2)
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:length])
        assert numbers(path) == [1]
        fill(path, 7)
        assert numbers(path) == [1, 7]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace('"number":2', '"number":9'), lines[2]], 2),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [lines[0], "not json", lines[2]], 2),
        (lambda lines: [lines[0], lines[1], "[]"], 3),
        (lambda lines: [lines[0], '{"number":NaN}', lines[2]], 2),
    ],
    ids=["edited", "removed", "swapped", "overwritten", "no object", "no number"],
)
def test_a_changed_journal_is_refused_by_line(tmp_path: Path, change: object, line: int) -> None:
    path = tmp_path / "work.jsonl"
    fill(path, 1, 2, 3)
    assert callable(change)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(ConfigError, match=rf"work\.jsonl:{line} "):
        read_journal(path)
    with pytest.raises(ConfigError, match=rf"work\.jsonl:{line} "):
        JournalWriter(path)


@pytest.mark.parametrize("line", [b"{}\n", b'{"hash":"' + b"0" * 64 + b'"}\n'])
def test_a_line_is_checked_as_it_stands(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "work.jsonl").write_bytes(line)
    with pytest.raises(ConfigError, match="chain of hashes is broken"):
        read_journal(tmp_path / "work.jsonl")


def test_a_growing_journal_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    reader = JournalReader(path)
    assert new_numbers(reader) == []
    fill(path, 1, 2)
    assert new_numbers(reader) == [1, 2]
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"number":3,')  # being written
    assert new_numbers(reader) == []
    fill(path, 3)
    assert new_numbers(reader) == [3]
    assert reader.position.head == read_journal(path)[-1]["hash"]
    path.write_bytes(path.read_bytes().replace(b'"number":3', b'"number":8') + b"{}\n")
    with pytest.raises(ConfigError, match=r"work\.jsonl:4 "):
        new_numbers(reader)
    path.write_bytes(whole)
    reader = JournalReader(path)
    new_numbers(reader)
    path.write_bytes(whole[:10])
    with pytest.raises(ConfigError, match="shorter than when it was last read"):
        new_numbers(reader)


def test_the_disk_is_waited_for_once_an_interval_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = 100.0, 0

    def fsync(descriptor: int) -> None:
        nonlocal synced
        synced += 1

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "fsync", fsync)
    journal = JournalWriter(tmp_path / "work.jsonl", sync_seconds=4)
    for _ in range(8):  # two seconds
        journal.append({"number": 1})
        now += 0.25
    assert synced == 0
    now += 2
    journal.append({"number": 2})
    journal.append({"number": 3})
    assert synced == 1
    journal.sync()
    journal.close()
    assert synced == 3


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    first = JournalWriter(path)
    with pytest.raises(ConfigError, match="another process"):
        JournalWriter(path)
    first.close()
    fill(path, 1)


def test_an_append_that_fails_half_way_leaves_a_usable_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "work.jsonl"
    journal = JournalWriter(path)
    journal.append({"number": 1})

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            journal.append({"number": 2})
    with path.open("a") as file:
        file.write('{"number":3,"ha')
    journal.append({"number": 4})
    journal.close()
    assert numbers(path) == [1, 2, 4]


@pytest.mark.timeout(60)
def test_a_writer_killed_while_appending_loses_nothing_it_had_written(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    for reported in (20, 37):
        before = len(numbers(path))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(reported)]
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        said += [int(word) for word in rest.split()]
        assert writer.returncode == -signal.SIGKILL
        survived = numbers(path)[before:]
        # The writer may have died after the last record was written.
        assert survived in (said, [*said, said[-1] + 1])
    fill(path, 0)
    assert numbers(path)[-1] == 0


def hole(path: Path, *, end: bytes = b"") -> Path:
    """Append 1 TB without a newline that takes no room, and then `end`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(2**40)
    with path.open("ab") as file:
        file.write(end)
    return path


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_journal_of_holes_is_refused_in_no_time(end: bytes, tmp_path: Path) -> None:
    fill(tmp_path / "work.jsonl", 1)
    path = hole(tmp_path / "work.jsonl", end=end)
    with pytest.raises(ConfigError, match=r"work.jsonl.*begins a line of more than 1048576 bytes"):
        read_journal(path)
    with pytest.raises(ConfigError, match=r"work.jsonl.*is part of a line of more than 8388608 bytes"):
        contains_any(path, b"nowhere")
    assert contains_any(path, b'"number":1')
    with pytest.raises(ConfigError, match=r"ends in more than 8388608 bytes|begins a line of more"):
        JournalWriter(path)
    assert path.stat().st_size == 2**40 + len(end)


def test_a_record_of_a_mebibyte_is_read(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path / "work.jsonl")
    journal.append({"number": 1, "filler": "x" * 1_000_000})
    journal.close()
    assert numbers(tmp_path / "work.jsonl") == [1]
