"""Required fields of each kind of record."""

from pathlib import Path
from typing import Any

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.ledger.journal import JournalReader, JournalWriter
from shoestring.trainer.ledger.record_batch import stream_records


@pytest.mark.parametrize(
    "change", [{"gpu_ms": 2**53 + 1}, {"tokens": -1}, {"step": 1.5}, {"wall_ns": 2**63}, {"monotonic_ns": True}]
)
def test_a_value_out_of_range_is_refused_with_a_right_hash(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "work.jsonl"
    journal = JournalWriter(path)
    record = {"kind": "step", "attempt": "a", "boot": "one", "monotonic_ns": 1, "wall_ns": 1}
    journal.append({**record, "step": 1, "gpu_ms": 1, "tokens": 1})
    journal.append({**record, "step": 1, "gpu_ms": 1, "tokens": 1, **change})
    journal.close()
    with pytest.raises(ConfigError, match=r"work\.jsonl:2"):
        list(stream_records(JournalReader(path)))
