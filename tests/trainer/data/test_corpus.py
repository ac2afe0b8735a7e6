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


def corpus(root: Path) -> tuple[Path, list[str]]:
    folder = root / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    (folder / "v.txt").write_text(TEXT[:300])
    data = [f"data.corpus={folder}", f"data.prepared={root / 'prepared'}", "data.validation=[v]"]
    return folder, ["data", "prepare", *data, "data.vocab_size=300", "model.vocab_size=300"]


def test_prepare_counts_and_names_what_it_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, verb = corpus(tmp_path)
    (folder / "sub" / "more.txt").write_text(TEXT)
    (folder / "UPPER.TXT").write_text(TEXT)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"x"))
    (folder / "readme.md").touch()
    os.mkfifo(folder / "p.txt")
    (folder / "d.jsonl").symlink_to("/dev/zero")
    code, output, errors = shoestring(capsys, *verb)
    assert code == 0, errors
    assert "6 entries were not read: UPPER.TXT, b.jsonl.gz, d.jsonl, p.txt, readme.md, sub." in output


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
        (b'{"text": 5}\n', "must be an object with a string"),
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


@pytest.mark.parametrize("sign", ["a", "7", "=", " ", "\n", "語"])
def test_a_word_without_end_is_refused(sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time to train merges grows with the square of the length of a word."""
    folder, verb = corpus(tmp_path)
    (folder / "w.jsonl").write_text(json.dumps({"text": "a word"}) + "\n" + json.dumps({"text": "b" + sign * 100_000}))
    code, _, errors = shoestring(capsys, *verb)
    assert code == 2
    assert "w.jsonl = 'document 2': holds a word of more than 32768 letters, digits, signs or blanks" in errors


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
    assert "is not a directory" in refusal(replace(config, corpus=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    assert "holds no text" in refusal(replace(config, corpus=str(tmp_path / "empty")))


def test_everything_wrong_with_the_files_is_listed_together(config: DataConfig) -> None:
    corpus = Path(config.corpus_location)
    (corpus / "empty.txt").write_text(" \n")
    (corpus / "nothing.jsonl").write_text("")
    (corpus / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (corpus / "lines.jsonl").write_text('{"text": "good"}\n{"txet": "bad"}\n')
    (corpus / "broken.jsonl").write_text('{"text": "half')
    (corpus / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (corpus / "alpha.jsonl").write_text('{"text": "same name"}\n')
    message = refusal(replace(config, validation=("held", "heldd")))
    for part in (
        "empty.txt = '': holds no text",
        "nothing.jsonl = '': holds no text",
        "latin.txt = 'the file': is not UTF-8 at byte 2",
        "lines.jsonl = 'line 2': must be an object",
        "broken.jsonl = 'line 1': is not JSON",
        "half.jsonl = 'line 1': holds half of a surrogate pair",
        "both alpha.txt and alpha.jsonl",
        "data.validation = 'heldd': not a file of this corpus, which has alpha,",
    ):
        assert part in message


def test_the_packaged_corpus_is_plain_ascii_prose() -> None:
    config = DataConfig(corpus="shakespeare", prepared="unused", vocab_size=2048, validation=("julius_caesar",))
    texts = [path.read_text("ascii") for path in sorted(Path(config.corpus_location).glob("*.txt"))]
    assert len(texts) == 7
    assert not set("".join(texts)) & set("*_#<>\\`|{}\r\t")
    assert all(text.endswith("\n") and "\n\n\n" not in text and " \n" not in text for text in texts)
