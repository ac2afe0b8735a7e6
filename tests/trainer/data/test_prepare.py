"""Preparation of shards from a corpus: repeatable, whole or not at all, and refused with a reason."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.small_corpus import refusal, silent
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.manifest import token_dtype
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.prepared import open_prepared_data, open_prepared_directory
from shoestring.trainer.data.shards import SplitWriter

# Kills itself during a preparation, at the first sentence that holds argv[3].
KILLED = """
import os, signal, sys
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
def report(line):
    if sys.argv[3] in line:
        os.kill(os.getpid(), signal.SIGKILL)
prepare_corpus(DataConfig(corpus=sys.argv[1], prepared=sys.argv[2], vocab_size=300, validation=("held",)), report)
"""


def contents(directory: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_tokens_give_back_every_document_between_its_boundaries(config: DataConfig) -> None:
    manifest = prepare_corpus(config, silent, shard_tokens=100)
    prepared = open_prepared_data(config)
    assert len(manifest.train.shards) > 3
    corpus = Path(config.corpus_location)
    lines = [json.loads(line)["text"] for line in (corpus / "lines.jsonl").read_text().splitlines()]
    documents = [(corpus / "alpha.txt").read_text(), *lines]
    split, tokenizer = prepared.train, prepared.tokenizer
    edges = [*split.document_starts_M.tolist(), split.num_tokens]
    assert len(edges) == len(documents) + 1
    for start, stop, text in zip(edges, edges[1:], documents, strict=False):
        *body, end = split.read_tokens(start, stop).tolist()
        assert end == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in body  # the letters `<|end|>` in a document stay letters
        assert tokenizer.decode(body) == text
    assert manifest.train.bytes == sum(len(text.encode()) for text in documents)
    assert [(s.work, s.split) for s in manifest.sources] == [
        ("alpha", "train"),
        ("held", "validation"),
        ("lines", "train"),
    ]


def test_the_tokenizer_never_sees_the_held_out_works(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    held = Path(config.corpus_location) / "held.txt"
    held.write_text("Quite other words. " * 100)
    other = replace(config, prepared=config.prepared + "2")
    prepare_corpus(other, silent)
    assert contents(config.prepared)["tokenizer.json"] == contents(other.prepared)["tokenizer.json"]
    assert contents(config.prepared)["train_00000.bin"] == contents(other.prepared)["train_00000.bin"]


def test_shard_size_changes_no_token(config: DataConfig) -> None:
    small, large = replace(config, prepared=config.prepared + "_small"), config
    prepare_corpus(small, silent, shard_tokens=7)
    prepare_corpus(large, silent)
    a, b = open_prepared_data(small).train, open_prepared_data(large).train
    assert np.array_equal(a.read_tokens(0, a.num_tokens), b.read_tokens(0, b.num_tokens))
    assert np.array_equal(a.read_tokens(5, 30), b.read_tokens(5, 30))


def test_two_preparations_are_identical_to_the_byte(config: DataConfig) -> None:
    other = replace(config, prepared=config.prepared + "2")
    first, second = prepare_corpus(config, silent), prepare_corpus(other, silent)
    assert contents(config.prepared) == contents(other.prepared)
    assert first.content_hash == second.content_hash


def test_a_second_preparation_reuses_the_first(config: DataConfig) -> None:
    lines: list[str] = []
    first = prepare_corpus(config, silent)
    stamp = (Path(config.prepared) / "manifest.json").stat().st_mtime_ns
    assert prepare_corpus(config, lines.append) == first
    assert "already prepared" in lines[-1]
    assert (Path(config.prepared) / "manifest.json").stat().st_mtime_ns == stamp


def test_data_of_other_text_or_settings_is_never_replaced(config: DataConfig) -> None:
    prepare_corpus(config, silent)
    before = contents(config.prepared)
    with (Path(config.corpus_location) / "alpha.txt").open("a") as file:
        file.write("More.")
    with pytest.raises(ConfigError, match="other text or settings"):
        prepare_corpus(config, silent)
    assert contents(config.prepared) == before
    with pytest.raises(ConfigError, match=r"data\.vocab_size = 301: .*300(.|\n)*data\.validation"):
        open_prepared_data(replace(config, vocab_size=301, validation=("alpha",)))


def test_a_directory_of_something_else_is_never_replaced(config: DataConfig) -> None:
    Path(config.prepared).mkdir(parents=True)
    (Path(config.prepared) / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        prepare_corpus(config, silent)
    assert list(contents(config.prepared)) == ["thesis.tex"]


@pytest.mark.parametrize("moment", ["Tokenizer", "train:", "Wrote"])
def test_a_killed_preparation_leaves_nothing_to_pick_up(config: DataConfig, moment: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, config.corpus, config.prepared, moment]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    leftovers = list(Path(config.prepared).parent.iterdir())
    assert [path.name.startswith(".prepared.preparing-") for path in leftovers] == [True]
    with pytest.raises(ConfigError, match="no prepared data"):
        open_prepared_data(config)
    lines: list[str] = []
    prepare_corpus(config, lines.append)
    open_prepared_data(config)
    assert f"{leftovers[0]} was left by a process that was killed; it is removed." in lines
    assert [path.name for path in Path(config.prepared).parent.iterdir()] == ["prepared"]
    assert not (Path(config.prepared) / ".lock").exists()


def test_an_interrupted_preparation_cleans_up(config: DataConfig) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("train:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, interrupt)
    assert list(Path(config.prepared).parent.iterdir()) == []


def test_of_two_concurrent_preparations_one_wins_and_both_have_the_result(config: DataConfig) -> None:
    lines: list[str] = []

    def race(line: str) -> None:
        lines.append(line)
        if line.startswith("Wrote"):
            prepare_corpus(config, silent)  # the other one gets there first

    manifest = prepare_corpus(config, race)
    assert "already prepared" in lines[-1]
    assert manifest == open_prepared_data(config).manifest
    assert [path.name for path in Path(config.prepared).parent.iterdir()] == ["prepared"]


def test_a_race_lost_to_other_settings_is_refused(config: DataConfig) -> None:
    def race(line: str) -> None:
        if line.startswith("Wrote"):
            prepare_corpus(replace(config, vocab_size=290), silent)

    with pytest.raises(ConfigError, match="other text or settings"):
        prepare_corpus(config, race)
    assert open_prepared_directory(Path(config.prepared)).manifest.vocabulary == 290


def test_large_vocabularies_get_wide_shards(tmp_path: Path) -> None:
    assert [token_dtype(size) for size in (258, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]
    with closing(SplitWriter(tmp_path, "train", np.dtype("<u4"), 2)) as writer:
        writer.add_document([1, 2**16, 129_279], 3)
        entry = writer.finish_split()
    assert [shard.bytes for shard in entry.shards] == [8, 4]
    stored = b"".join((tmp_path / shard.file).read_bytes() for shard in entry.shards)
    assert np.frombuffer(stored, dtype="<u4").tolist() == [1, 2**16, 129_279]


def test_holding_out_everything_is_refused(config: DataConfig) -> None:
    assert "every file is held out for validation" in refusal(replace(config, validation=("alpha", "held", "lines")))


def test_a_vocabulary_out_of_reach_is_refused(config: DataConfig) -> None:
    message = refusal(replace(config, vocab_size=50_000))
    assert "data.vocab_size = 50000: cannot be reached: the training text gives " in message


def test_a_place_that_cannot_be_written_is_refused(config: DataConfig) -> None:
    inside_a_file = str(Path(config.corpus_location) / "alpha.txt" / "prepared")
    with pytest.raises(ConfigError, match="cannot be created"):
        prepare_corpus(replace(config, prepared=inside_a_file), silent)
