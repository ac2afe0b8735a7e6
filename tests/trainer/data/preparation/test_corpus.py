"""The files of a corpus: which are read, left out, or refused."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.tests.launch.command_line import shoestring
from shoestring.tests.launch.small_checkpoint import TEXT
from shoestring.tests.trainer.data.small_corpus import refusal
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.formats import BadRecords
from shoestring.trainer.data.preparation import corpus as corpus_module
from shoestring.trainer.data.preparation.corpus import list_corpus, sample_texts


def corpus(root: Path) -> tuple[Path, list[str]]:
    folder = root / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    (folder / "v.txt").write_text(TEXT[:300])
    data = [f"data.corpus={folder}", f"data.prepared={root / 'prepared'}", "data.validation=[v]"]
    return folder, ["data", "prepare", *data, "data.vocab_size=300", "model.vocab_size=300"]


def test_prepare_counts_and_names_what_it_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, verb = corpus(tmp_path)
    for name in ("sub/more.txt", "UPPER.TXT"):
        (folder / name).write_text(TEXT)
    (folder / "sub" / "b.JSONL.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    for name in ("readme.md", "sub/b.bz2", ".hidden.txt", "list.csv"):
        (folder / name).touch()
    code, output, errors = shoestring(capsys, *verb)
    assert code == 0, errors
    assert "4 files were not read: .hidden.txt, list.csv, readme.md, sub/b.bz2." in output
    assert "5 files," in output


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, verb = corpus(tmp_path)
    if kind == "fifo":
        os.mkfifo(folder / "p.txt")
    else:
        (folder / "p.txt").symlink_to("/dev/zero")
    code, _, errors = shoestring(capsys, *verb)
    assert code == 2
    assert "p.txt" in errors
    assert "not a regular file" in errors


@pytest.mark.parametrize("name", ["big.txt", "big.jsonl"])
def test_a_link_of_a_corpus_that_leads_nowhere_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, verb = corpus(tmp_path)
    (folder / name).symlink_to("/not/mounted/big")
    code, _, errors = shoestring(capsys, *verb)
    assert code == 2
    assert f"{folder / name} = '/not/mounted/big': is a broken link" in errors
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("raw", "gist"),
    [
        (b'{"text": "a", "text": "b"}\n', "a key occurs twice"),
        (b"[" * 90_000 + b"\n", "is not JSON"),
        (b'{"text": 5}\n', 'must have a string under the key "text"'),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "is not JSON"),
    ],
)
def test_a_line_of_a_corpus_that_cannot_be_used_is_named(
    raw: bytes, gist: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, verb = corpus(tmp_path)
    (folder / "w.jsonl").write_bytes(raw)
    code, _, errors = shoestring(capsys, *verb)
    assert code == 2
    assert "w.jsonl" in errors
    assert gist in errors


@pytest.mark.parametrize("sign", ["a", "7", " ", "語"])
def test_a_word_without_end_is_not_learned_from_but_prepared(
    sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time to train merges grows with the square of the length of a word."""
    folder, verb = corpus(tmp_path)
    (folder / "w.jsonl").write_text(json.dumps({"text": "a word"}) + "\n" + json.dumps({"text": "b" + sign * 100_000}))
    code, output, errors = shoestring(capsys, *verb)
    assert code == 0, errors
    assert "documents: 3" in output


def test_a_long_text_without_blanks_is_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, verb = corpus(tmp_path)
    (folder / "w.txt").write_text("a1," * 50_000)
    assert shoestring(capsys, *verb)[0] == 0


def test_a_directory_that_links_to_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, verb = corpus(tmp_path)
    (tmp_path / "prepared").symlink_to("prepared")
    for name in ("prepare", "inspect"):
        code, _, errors = shoestring(capsys, "data", name, *verb[2:])
        assert code == 2
        assert "prepared" in errors
    for arguments in (["import", tmp_path / "prepared", tmp_path / "made"], ["budget", tmp_path / "prepared"]):
        assert shoestring(capsys, *arguments)[0] == 2


def test_a_vocabulary_of_millions_is_refused_before_memory_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, verb = corpus(tmp_path)
    code, _, errors = shoestring(capsys, *verb[:-2], "data.vocab_size=16777216", "model.vocab_size=16777216")
    assert code == 2
    assert "cannot be reached" in errors


def test_an_error_of_the_system_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, verb = corpus(tmp_path)
    long = tmp_path / ("x" * 300)
    for arguments in (["budget", long], ["report", long], ["checkpoint", "ls", long], ["trace", long]):
        code, _, errors = shoestring(capsys, *arguments)
        assert code == 2, errors
        assert "x" * 300 in errors
    code, _, errors = shoestring(capsys, *verb, f"data.prepared={long}")
    assert code == 2
    assert "x" * 300 in errors


def test_a_missing_or_empty_corpus_is_refused(config: DataConfig, tmp_path: Path) -> None:
    assert "does not exist" in refusal(replace(config, corpus=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    assert "holds no text" in refusal(replace(config, corpus=str(tmp_path / "empty")))


def test_wrong_names_are_listed_together(config: DataConfig) -> None:
    message = refusal(replace(config, validation=("held", "heldd", "sub/*")))
    assert "data.validation = 'heldd': not a file of this corpus, which has alpha, held, lines" in message
    assert "data.validation = 'sub/*'" in message


@pytest.mark.parametrize("pattern", ["held", "held.txt", "h*.txt"])
def test_validation_files_are_named_by_path_stem_or_glob(config: DataConfig, pattern: str) -> None:
    files = list_corpus(replace(config, validation=(pattern,)), lambda line: None)
    assert [(file.stored.name, file.is_validation) for file in files] == [
        ("alpha.txt", False),
        ("held.txt", True),
        ("lines.jsonl", False),
    ]


def test_the_sample_takes_the_start_of_every_file_in_proportion(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(config.corpus_location)
    for name, count in (("x", 100), ("y", 300)):
        records = "".join(json.dumps({"text": f"{name} {n:03d} " * 4}) + "\n" for n in range(count))
        (folder / f"{name}.jsonl").write_text(records)
    files = [file for file in list_corpus(config, lambda line: None) if file.stored.name in ("x.jsonl", "y.jsonl")]
    monkeypatch.setattr(corpus_module, "SAMPLE_BYTES", 4000)
    texts = list(sample_texts(config, files, BadRecords(0)))
    counts = [sum(text.startswith(name) for text in texts) for name in "xy"]
    assert sum(map(len, texts)) < 4100
    assert counts[1] == pytest.approx(3 * counts[0], abs=3)
    assert texts[0].startswith("x 000")


def test_the_packaged_corpus_is_plain_ascii_prose() -> None:
    config = DataConfig(corpus="shakespeare", prepared="unused", vocab_size=2048, validation=("julius_caesar",))
    texts = [path.read_text("ascii") for path in sorted(Path(config.corpus_location).glob("*.txt"))]
    assert len(texts) == 7
    assert not set("".join(texts)) & set("*_#<>\\`|{}\r\t")
    assert all(text.endswith("\n") and "\n\n\n" not in text and " \n" not in text for text in texts)
