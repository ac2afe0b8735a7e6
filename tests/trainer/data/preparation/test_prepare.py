"""Preparation of shards from a corpus: repeatable, resumable, and refused with a reason."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.small_corpus import refusal, silent
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.manifest import read_parts
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.prepared import open_prepared_data, open_prepared_directory, verify_prepared_data
from shoestring.trainer.data.shards import read_document_starts
from shoestring.trainer.data.tokenizer import train_tokenizer

# Kills itself when the task number argv[3] has left its files, before or after its record, as argv[4] says.
KILLED = """
import os, signal, sys
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation import prepare, run_task
count, at, moment = 0, int(sys.argv[3]), sys.argv[4]
def replace_file(path, raw, replace=run_task.replace_file_atomically):
    global count
    count += 1
    if count == at and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(path, raw)
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
run_task.replace_file_atomically = replace_file
prepare.prepare_corpus(
    DataConfig(corpus=sys.argv[1], prepared=sys.argv[2], vocab_size=300, validation=("held",)), lambda line: None
)
"""


def contents(directory: str | Path) -> dict[str, bytes]:
    """Return the files of a prepared directory, except the records of tasks."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


def records(directory: str) -> dict[str, int]:
    """Return the completion records with the times at which they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (Path(directory) / "tasks").glob("*.json")}


def test_tokens_give_back_every_document_between_its_boundaries(config: DataConfig) -> None:
    config = replace(config, shuffle=False)
    manifest = prepare_corpus(config, silent, shard_tokens=100)
    prepared = open_prepared_data(config)
    assert len(prepared.train.shard_starts) > 4
    corpus = Path(config.corpus_location)
    lines = [json.loads(line)["text"] for line in (corpus / "lines.jsonl").read_text().splitlines()]
    documents = [(corpus / "alpha.txt").read_text(), *lines]
    split, tokenizer = prepared.train, prepared.tokenizer
    starts = np.concatenate(list(read_document_starts(Path(config.prepared), prepared.parts, "train")))
    edges = [*starts.tolist(), split.num_tokens]
    assert len(edges) == len(documents) + 1 == manifest.train.documents + 1
    for start, stop, text in zip(edges, edges[1:], documents, strict=False):
        *body, end = split.read_tokens(start, stop).tolist()
        assert end == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in body  # the letters `<|end|>` in a document stay letters
        assert tokenizer.decode(body) == text
    assert manifest.train.bytes == sum(len(text.encode()) for text in documents)
    assert [piece.file for part in prepared.parts for piece in part.pieces] == ["alpha.txt", "held.txt", "lines.jsonl"]
    assert [part.train is None for part in prepared.parts] == [False, True, False]


def test_documents_of_a_file_are_shuffled_by_the_seed(config: DataConfig) -> None:
    rows = {}
    for seed in (0, 1):
        for name in ("a", "b"):
            prepared = replace(config, seed=seed, prepared=f"{config.prepared}_{seed}{name}")
            prepare_corpus(prepared, silent)
            split = open_prepared_data(prepared).train
            rows[seed, name] = split.read_tokens(0, split.num_tokens).tolist()
    assert rows[0, "a"] == rows[0, "b"]
    assert rows[1, "a"] == rows[1, "b"] != rows[0, "a"]
    assert sorted(rows[0, "a"]) == sorted(rows[1, "a"])


def test_the_tokenizer_never_sees_the_held_out_files(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    held = Path(config.corpus_location) / "held.txt"
    held.write_text("Quite other words. " * 100)
    other = replace(config, prepared=config.prepared + "2")
    prepare_corpus(other, silent)
    mine, theirs = contents(config.prepared), contents(other.prepared)
    assert mine["tokenizer.json"] == theirs["tokenizer.json"]
    shards = [name for name in mine if name.endswith(".train.00000.bin")]
    assert shards
    assert [mine[name] for name in shards] == [theirs[name] for name in shards]


def test_shard_size_changes_no_token(config: DataConfig) -> None:
    small, large = replace(config, prepared=config.prepared + "_small"), config
    prepare_corpus(small, silent, shard_tokens=7)
    prepare_corpus(large, silent)
    a, b = open_prepared_data(small).train, open_prepared_data(large).train
    assert np.array_equal(a.read_tokens(0, a.num_tokens), b.read_tokens(0, b.num_tokens))
    assert np.array_equal(a.read_tokens(5, 30), b.read_tokens(5, 30))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    config: DataConfig, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoestring.trainer.data.preparation import prepare

    alone, other = replace(config, workers=1), replace(config, workers=workers, prepared=config.prepared + "2")
    first = prepare_corpus(alone, silent)
    monkeypatch.setattr(prepare, "_SMALL_CORPUS", 0)
    second = prepare_corpus(other, silent)
    assert contents(config.prepared) == contents(other.prepared)
    assert first.content_hash == second.content_hash


def test_a_second_preparation_reuses_the_first(config: DataConfig) -> None:
    lines: list[str] = []
    first = prepare_corpus(config, silent)
    before, written = contents(config.prepared), records(config.prepared)
    assert prepare_corpus(config, lines.append) == first
    assert "already prepared" in lines[-1]
    assert contents(config.prepared) == before
    assert records(config.prepared) == written


def test_a_new_file_alone_is_prepared(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    written = records(config.prepared)
    (Path(config.corpus_location) / "sub").mkdir()
    (Path(config.corpus_location) / "sub" / "more.txt").write_text("More of the owl and the pussycat.")
    lines: list[str] = []
    prepare_corpus(config, lines.append)
    assert "3 of 4 tasks were finished before and are kept." in lines
    assert records(config.prepared).items() > written.items()
    fresh = replace(config, prepared=config.prepared + "2", tokenizer=f"{config.prepared}/tokenizer.json")
    prepare_corpus(replace(fresh, vocab_size=None, eos_token="<|end|>"), silent)
    assert contents(config.prepared) == contents(fresh.prepared)


def test_a_changed_file_is_prepared_again_and_a_removed_one_leaves(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    corpus = Path(config.corpus_location)
    written = records(config.prepared)
    with (corpus / "alpha.txt").open("a") as file:
        file.write("More.")
    (corpus / "lines.jsonl").unlink()
    manifest = prepare_corpus(config, silent)
    assert manifest.train.documents == 1
    assert len(records(config.prepared)) == 2
    assert len(records(config.prepared).items() - written.items()) == 1
    verify_prepared_data(Path(config.prepared))
    assert not list(Path(config.prepared).glob("*.unfinished*"))
    shards = list(Path(config.prepared).glob("*.bin"))
    assert len(shards) == 2


def test_a_copied_corpus_is_recognized_by_its_bytes(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    for path in Path(config.corpus_location).iterdir():
        os.utime(path, ns=(0, 0))
    lines: list[str] = []
    prepare_corpus(config, lines.append)
    assert "3 of 3 tasks were finished before and are kept." in lines


def test_other_settings_are_refused_by_name(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    before = contents(config.prepared)
    with pytest.raises(ConfigError, match=r"was prepared with other settings: seed 0, not 1\."):
        prepare_corpus(replace(config, seed=1), silent)
    assert contents(config.prepared) == before
    with pytest.raises(ConfigError, match=r"data\.validation = (.|\n)*data\.vocab_size = 301: .*300"):
        open_prepared_data(replace(config, vocab_size=301, validation=("alpha",)))


def test_a_directory_of_something_else_is_never_written(config: DataConfig) -> None:
    Path(config.prepared).mkdir(parents=True)
    (Path(config.prepared) / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty and has no settings\.json"):
        prepare_corpus(config, silent)
    assert list(contents(config.prepared)) == ["thesis.tex"]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("task", [1, 2, 3])
def test_a_killed_preparation_goes_on_where_it_was(config: DataConfig, task: int, moment: str) -> None:
    whole = replace(config, prepared=config.prepared + "_whole")
    prepare_corpus(whole, silent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, config.corpus, config.prepared, str(task), moment]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    with pytest.raises(ConfigError, match="preparation is not finished"):
        open_prepared_data(config)
    lines: list[str] = []
    prepare_corpus(config, lines.append)
    kept = task - 1 if moment == "before" else task
    assert kept == 0 or f"{kept} of 3 tasks were finished before and are kept." in lines
    assert contents(config.prepared) == contents(whole.prepared)
    assert not list((Path(config.prepared) / "tasks").glob("*.unfinished*"))


def test_a_directory_is_prepared_by_one_process_at_a_time(config: DataConfig) -> None:
    def race(line: str) -> None:
        if "held out" in line:
            with pytest.raises(ConfigError, match="is being prepared by another process"):
                prepare_corpus(config, silent)

    prepare_corpus(config, race)
    open_prepared_data(config)


def test_a_share_of_the_documents_is_held_out(config: DataConfig) -> None:
    corpus = Path(config.corpus_location)
    (corpus / "many.jsonl").write_text("".join(json.dumps({"text": f"Document {n}."}) + "\n" for n in range(2000)))
    share = replace(config, validation=(), validation_fraction=0.1)
    manifest = prepare_corpus(share, silent)
    documents = manifest.train.documents + manifest.validation.documents
    assert documents == 2007
    # Binomial: 200 of 2,000, standard deviation 13.4.
    assert abs(manifest.validation.documents - 0.1 * documents) < 4 * 13.5
    parts = read_parts(Path(share.prepared), manifest)
    assert sum(part.train is not None and part.validation is not None for part in parts) >= 1


def test_empty_records_are_counted_and_broken_ones_allowed_up_to_the_limit(config: DataConfig) -> None:
    (Path(config.corpus_location) / "mixed.jsonl").write_text('{"text": "good"}\n{"text": " "}\n{"txet": 1}\n{\n')
    assert "mixed.jsonl = 'line 3'" in refusal(config)
    message = refusal(replace(config, max_bad_records=1))
    assert "line 3" in message
    assert "line 4" in message
    lines: list[str] = []
    prepare_corpus(replace(config, max_bad_records=2), lines.append)
    assert "1 records without text were skipped." in lines
    assert any(line.startswith("2 broken records were skipped") and "line 3" in line for line in lines)


def test_the_limit_of_broken_records_is_for_all_files_together(config: DataConfig) -> None:
    tokenizer = train_tokenizer(["some text"], 260)
    for name in ("x", "y"):
        (Path(config.corpus_location) / f"{name}.jsonl").write_text('{"text": "good"}\n{\n')
    with pytest.raises(ConfigError, match=r"data\.max_bad_records = 1: 2 records are broken.*x\.jsonl.*y\.jsonl"):
        prepare_corpus(replace(config, max_bad_records=1, vocab_size=None), silent, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"2 records are broken"):  # also when all tasks have their records
        prepare_corpus(replace(config, max_bad_records=1, vocab_size=None), silent, tokenizer=tokenizer)


def test_holding_out_everything_is_refused(config: DataConfig) -> None:
    assert "every file is held out for validation" in refusal(replace(config, validation=("alpha", "held", "lines")))


def test_a_vocabulary_out_of_reach_is_refused(config: DataConfig) -> None:
    message = refusal(replace(config, vocab_size=50_000))
    assert "data.vocab_size = 50000: cannot be reached: the training text gives " in message


def test_a_place_that_cannot_be_written_is_refused(config: DataConfig) -> None:
    (Path(config.corpus).parent / "file").touch()
    with pytest.raises(ConfigError, match="cannot be created"):
        prepare_corpus(replace(config, prepared=str(Path(config.corpus).parent / "file" / "prepared")), silent)


@pytest.mark.parametrize("corpus", ["", "*.txt", "**/*.jsonl"])
def test_a_place_inside_the_corpus_is_refused(config: DataConfig, corpus: str) -> None:
    inside = replace(config, corpus=str(Path(config.corpus) / corpus), prepared=f"{config.corpus}/sub/prepared")
    with pytest.raises(ConfigError, match=r"is inside data\.corpus"):
        prepare_corpus(replace(inside, validation=(), validation_fraction=0.5), silent)


def test_a_failed_addition_leaves_the_data_as_they_were(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    alpha = Path(config.corpus_location) / "alpha.txt"
    alpha.write_text(alpha.read_text() + "More.")
    broken = Path(config.corpus_location) / "zz.jsonl"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="zz"):
        prepare_corpus(config, silent)
    verify_prepared_data(Path(config.prepared))
    broken.write_text('{"text": "mended"}')
    prepare_corpus(config, silent)
    found = verify_prepared_data(Path(config.prepared))
    assert found.manifest.train.documents == 7
    assert len(list(Path(config.prepared).glob("*.bin"))) == 4


def test_settings_may_change_until_a_task_is_finished(config: DataConfig) -> None:
    (Path(config.corpus_location) / "alpha.txt").unlink()
    (Path(config.corpus_location) / "lines.jsonl").write_text('{"content": "a text under another key"}\n')
    tokenizer = train_tokenizer(["some text"], 260)
    with pytest.raises(ConfigError, match="its keys are content"):
        prepare_corpus(replace(config, vocab_size=None, workers=1), silent, tokenizer=tokenizer)
    for record in (Path(config.prepared) / "tasks").glob("*.json"):
        record.unlink()
    right = replace(config, text_key="content", vocab_size=None)
    assert prepare_corpus(right, silent, tokenizer=tokenizer).train.documents == 1


def test_a_kill_before_the_settings_are_written_is_no_obstacle(config: DataConfig) -> None:
    (Path(config.prepared) / "tasks").mkdir(parents=True)
    (Path(config.prepared) / ".lock").touch()
    manifest = prepare_corpus(config, silent)
    assert verify_prepared_data(Path(config.prepared)).manifest == manifest


def test_a_file_that_changes_while_it_is_read_is_refused(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.trainer.data.preparation import run_task

    alpha = Path(config.corpus_location) / "alpha.txt"
    write = run_task._write_splits

    def change(*arguments: Any) -> Any:
        done = write(*arguments)
        alpha.write_text(alpha.read_text().swapcase())
        return done

    monkeypatch.setattr(run_task, "_write_splits", change)
    with pytest.raises(ConfigError, match=r"alpha\.txt.*has changed while it was read"):
        prepare_corpus(config, silent)


def test_the_tokenizer_never_sees_the_held_out_documents(config: DataConfig) -> None:
    from shoestring.trainer.data.formats import BadRecords
    from shoestring.trainer.data.preparation.corpus import list_corpus, sample_texts

    texts = [f"Document {number}." for number in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (Path(config.corpus_location) / "lines.jsonl").write_text(lines)
    share = replace(config, validation=(), validation_fraction=0.25, shuffle=False)
    manifest = prepare_corpus(share, silent)
    seen = list(sample_texts(share, list_corpus(share, silent), BadRecords(0)))
    assert len(seen) == manifest.train.documents
    prepared = open_prepared_data(share)
    tokens = prepared.train.read_tokens(0, prepared.train.num_tokens).tolist()
    assert prepared.tokenizer.decode(tokens).split("<|end|>")[:-1] == seen


def test_data_of_another_format_is_named(config: DataConfig) -> None:
    Path(config.prepared).mkdir(parents=True)
    (Path(config.prepared) / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match="reads format 2"):
        prepare_corpus(config, silent)


def test_prepared_directory_opens_without_the_configuration(config: DataConfig) -> None:
    manifest = prepare_corpus(replace(config, license="CC0"), silent)
    assert open_prepared_directory(Path(config.prepared)).manifest == manifest
    assert (manifest.license, manifest.source) == ("CC0", config.corpus)
