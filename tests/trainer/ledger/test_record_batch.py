"""Lines parsed in batches give what they give one by one, with the same checks."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.ledger import record_batch
from shoestring.trainer.ledger.journal import GENESIS_HASH, JournalReader, JournalWriter
from shoestring.trainer.ledger.record_batch import RecordBatch, stream_records
from shoestring.trainer.ledger.records import LedgerRecord, parse_record
from shoestring.trainer.ledger.replay import Ledger
from shoestring.trainer.ledger.terms import LEDGER_FORMAT


def some_record(dice: random.Random, step: int, boot: str) -> dict[str, Any]:
    wall, monotonic = dice.randrange(-10, 2**63), dice.randrange(0, 10**14)
    own = {"attempt": dice.choice("aab"), "boot": boot, "monotonic_ns": monotonic, "wall_ns": wall}
    gpu_ms = dice.choice((0, 7, 2**53))
    kind = dice.choice(("step", "step", "step", "interval", "interval", "skipped", "ready", "resume", "end"))
    content: dict[str, dict[str, Any]] = {
        "step": {"step": step, "gpu_ms": gpu_ms, "tokens": 8},
        "skipped": {"step": step, "gpu_ms": gpu_ms, "tokens": 8},
        "interval": {"bucket": dice.choice(("data_stall", "telemetry")), "gpu_ms": gpu_ms},
        "ready": {},
        "resume": {"step": dice.randrange(step + 1)},
        "end": {"clean": dice.random() < 0.5},
    }
    return {"kind": kind, **own, **content[kind]}


def write(path: Path, seed: int, records: int = 300) -> None:
    """Write a ledger of two concurrent launches, clocks that jump, boots that change, and now and then an extra key."""
    dice, step, boot = random.Random(seed), 1, "one"
    journal = JournalWriter(path)
    instant = {"boot": boot, "monotonic_ns": 0, "wall_ns": 0}
    for attempt in ("a", "b"):
        opened = {"attempt": attempt, "ranks": 3, "phase": "pre_train", "budget_gpu_hours": 1.0}
        opened |= {"format": LEDGER_FORMAT, "version": "0.1.0"}
        journal.append({"kind": "begin", **opened, **instant})
    for _ in range(records):
        boot = dice.choice(("two", "önë")) if dice.random() < 0.02 else boot
        step = step + 1 if dice.random() < 0.9 else dice.randrange(1, step + 1)
        record = some_record(dice, step, boot)
        journal.append({**record, "more": "x"} if dice.random() < 0.02 else record)
    journal.close()


def stream_singly(reader: JournalReader, end: int | None = None) -> Iterator[LedgerRecord]:
    return map(parse_record, reader.stream_lines(end))


@pytest.mark.parametrize("seed", range(8))
def test_any_ledger_is_the_same_in_batches_and_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(record_batch, "MAX_BATCH_RECORDS", 5)
    path = tmp_path / "work.jsonl"
    write(path, seed)
    one, many = JournalReader(path), JournalReader(path)
    singly, together = Ledger(), Ledger()
    singly.replay(stream_singly(one))
    batches = list(stream_records(many))
    together.replay(batches)
    assert sum(isinstance(each, RecordBatch) for each in batches) > 20
    assert together == singly
    assert together.tally.retained.step_numbers == singly.tally.retained.step_numbers
    assert many.position == one.position


def test_every_place_to_stop_at_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    write(path, 1, 40)
    for end in range(0, path.stat().st_size, 97):
        one, many = JournalReader(path), JournalReader(path)
        for _ in stream_singly(one, end):
            pass
        for _ in stream_records(many, end):
            pass
        assert many.position == one.position


def lines_of_steps(path: Path, number: int) -> list[bytes]:
    journal = JournalWriter(path)
    for step in range(1, number + 1):
        instant = {"boot": "one", "monotonic_ns": step, "wall_ns": step}
        content = {"step": step, "gpu_ms": 1000, "tokens": 8}
        journal.append({"kind": "step", "attempt": "a", **instant, **content})
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"gpu_ms":1000', b'"gpu_ms":1001'),
        (b'"gpu_ms":1000', b'"gpu_ms":01000'),
        (b'"step":5', b'"step":5.0'),
        (b'"step":5', b'"step":05'),
        (b'"attempt":"a"', b'"attempt":"b"'),
        (b'"kind":"step"', b'"kind":"skip"'),
    ],
)
def test_a_line_that_was_changed_is_named(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "work.jsonl"
    lines = lines_of_steps(path, 9)
    lines[4] = lines[4].replace(old, new)
    path.write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match=r"work\.jsonl:5.*chain of hashes is broken"):
        list(stream_records(JournalReader(path)))
    path.write_bytes(b"".join(lines[:3] + lines[5:]))
    with pytest.raises(ConfigError, match=r"work\.jsonl:4.*chain of hashes is broken"):
        list(stream_records(JournalReader(path)))


def test_the_lines_of_a_run_are_read_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    lines_of_steps(path, 9)
    (batch,) = stream_records(JournalReader(path))
    assert isinstance(batch, RecordBatch)
    assert list(batch.steps) == list(range(1, 10))
    assert json.loads(path.read_bytes().splitlines()[-1])["hash"] != GENESIS_HASH
