"""One task: its part, its record, and nothing half made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer
from shoestring.trainer.data.manifest import DataPart, PreparationSettings
from shoestring.trainer.data.preparation import run_task as module
from shoestring.trainer.data.preparation.run_task import (
    PreparationJob,
    find_record,
    record_path,
    remove_abandoned_folders,
    run_task,
)
from shoestring.trainer.data.preparation.tasks import Task
from shoestring.trainer.data.storage import list_files

SETTINGS = PreparationSettings(
    tokenizer_sha256="0" * 64,
    eos_token_id=1,
    vocab_size=129_280,
    text_key="text",
    validation=("v",),
    validation_fraction=0.0,
    seed=0,
    shuffle=False,
    fim_rate=0.0,
    fim_token_ids=(128_801, 128_800, 128_802),
    token_split_rate=0.0,
    shard_tokens=2**20,
)
TEXTS = [f"Document {number}:\nreturn ({number});\n" + "word " * (number % 7) for number in range(300)]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Task(tuple(list_files(str(tmp_path / "a.jsonl"))), is_validation=False)


def make_job(folder: Path, **changes: Any) -> PreparationJob:
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    return PreparationJob(folder, replace(SETTINGS, **changes), deepseek_tokenizer(), max_bad_records=0)


def documents(folder: Path, part: DataPart, split: str = "train") -> list[list[int]]:
    found = part.split(split)
    assert found is not None
    tokens = np.concatenate([np.fromfile(folder / shard.file, "<u4") for shard in found.shards])
    starts = np.fromfile(folder / found.starts.file, "<i8")
    return [each.tolist() for each in np.split(tokens, starts[1:])]


def test_documents_are_in_order_without_shuffling(task: Task, tmp_path: Path) -> None:
    job = make_job(tmp_path / "out")
    found = documents(job.directory, run_task(job, task).part)
    assert found == [[*deepseek_tokenizer().encode(text), 1] for text in TEXTS]


@pytest.mark.parametrize("bucket", [50, 10**6])
def test_documents_are_shuffled_within_buckets(
    task: Task, tmp_path: Path, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = documents(tmp_path / "plain", run_task(make_job(tmp_path / "plain"), task).part)
    monkeypatch.setattr(module, "_BUCKET_DOCUMENTS", bucket)
    shuffled = documents(tmp_path / "out", run_task(make_job(tmp_path / "out", shuffle=True), task).part)
    for begin in range(0, len(plain), bucket):
        assert sorted(shuffled[begin : begin + bucket]) == sorted(plain[begin : begin + bucket])
    moved = [abs(plain.index(each) - place) for place, each in enumerate(shuffled)]
    assert np.mean(moved) == pytest.approx(min(bucket, len(plain)) / 3, rel=0.25)


def test_a_share_of_the_documents_is_reordered_for_fill_in_the_middle(task: Task, tmp_path: Path) -> None:
    job = make_job(tmp_path / "out", fim_rate=0.3)
    found = documents(job.directory, run_task(job, task).part)
    begin, hole, end = SETTINGS.fim_token_ids
    tokenizer, reordered = deepseek_tokenizer(), 0
    for tokens, text in zip(found, TEXTS, strict=True):
        if tokens[0] != begin:
            assert tokenizer.decode(tokens[:-1]) == text
            continue
        reordered += 1
        at_hole, at_end = tokens.index(hole), tokens.index(end)
        prefix, suffix, middle = tokens[1:at_hole], tokens[at_hole + 1 : at_end], tokens[at_end + 1 : -1]
        assert tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix) == text
    assert abs(reordered - 0.3 * len(TEXTS)) < 4 * (0.21 * len(TEXTS)) ** 0.5


def test_a_share_of_the_joined_tokens_is_split(task: Task, tmp_path: Path) -> None:
    plain = documents(tmp_path / "plain", run_task(make_job(tmp_path / "plain"), task).part)
    split = documents(tmp_path / "out", run_task(make_job(tmp_path / "out", token_split_rate=0.5), task).part)
    tokenizer = deepseek_tokenizer()
    assert [tokenizer.decode(tokens) for tokens in split] == [tokenizer.decode(tokens) for tokens in plain]
    joined = tokenizer.encode(");\n")
    assert len(joined) == 1
    before, after = (sum(tokens.count(joined[0]) for tokens in each) for each in (plain, split))
    assert before == len(TEXTS)
    assert abs(after - before / 2) < 4 * (0.25 * before) ** 0.5


def test_a_record_holds_until_settings_or_files_change(task: Task, tmp_path: Path) -> None:
    job = make_job(tmp_path / "out")
    record = run_task(job, task)
    assert find_record(job.directory, task, job.settings) == record
    assert find_record(job.directory, task, replace(job.settings, seed=1)) is None
    shard = job.directory / record.part.files[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    assert find_record(job.directory, task, job.settings) is None
    run_task(job, task)
    record_path(job.directory, task).write_text("{")
    assert find_record(job.directory, task, job.settings) is None


def test_a_failed_task_leaves_neither_record_nor_part(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text() + "{\n")
    job = make_job(tmp_path / "out")
    with pytest.raises(ConfigError, match="line 301"):
        run_task(job, task)
    assert [each.name for each in job.directory.rglob("*")] == ["tasks"]


def test_folders_of_killed_tasks_are_removed_and_those_of_others_left(tmp_path: Path) -> None:
    import os
    import platform

    (tmp_path / "tasks").mkdir()
    here = platform.node()
    for name in (f"a.unfinished-{here}-{os.getpid()}-0", f"b.unfinished-{here}-4194999-0", "c.unfinished-other-1-0"):
        (tmp_path / "tasks" / name).mkdir()
    old = tmp_path / "tasks" / "d.unfinished-other-1-0"
    old.mkdir()
    os.utime(old, (0, 0))
    remove_abandoned_folders(tmp_path)
    assert {path.name[0] for path in (tmp_path / "tasks").iterdir()} == {"a", "c"}
