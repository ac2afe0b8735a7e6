"""Token files of Megatron and datatrove are read in place, and refused if their index does not fit."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.small_corpus import silent
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.prepared import open_prepared_data, verify_prepared_data
from shoestring.trainer.data.shards import read_document_starts
from shoestring.trainer.data.tokenizer import train_tokenizer

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0]]
CODES = {"<u2": 8, "<i4": 4, "<i8": 5}


def write_megatron(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2", cut: int = 1) -> None:
    """Write `.bin` and `.idx`; each document is cut into up to `cut` sequences."""
    sequences = [list(part) for document in documents for part in np.array_split(document, cut) if len(part)]
    counts = [sum(1 for part in np.array_split(document, cut) if len(part)) for document in documents]
    path.with_suffix(".bin").write_bytes(np.concatenate([np.array(each) for each in sequences]).astype(dtype).tobytes())
    lengths = np.array([len(each) for each in sequences])
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents) + 1)
    bounds = np.concatenate(([0], np.cumsum(counts)))
    arrays = lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + bounds.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(head + arrays)


def write_datatrove(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> None:
    path.with_suffix(".ds").write_bytes(np.concatenate([np.array(each) for each in documents]).astype(dtype).tobytes())
    ends = np.cumsum([len(each) for each in documents])
    path.with_suffix(".ds.index").write_bytes(ends.astype("<u8").tobytes())
    path.with_suffix(".ds.metadata").write_text("tokenizer|2\n")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    tokenizer = train_tokenizer(["to be or not to be"], 260)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.raw)
    (tmp_path / "corpus").mkdir()
    return DataConfig(
        corpus=str(tmp_path / "corpus"),
        prepared=str(tmp_path / "prepared"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        eos_token="<|end|>",
        validation=("held",),
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    "megatron": lambda path: write_megatron(path, DOCUMENTS),
    "megatron, int32": lambda path: write_megatron(path, DOCUMENTS, "<i4"),
    "megatron, int64, several sequences": lambda path: write_megatron(path, DOCUMENTS, "<i8", cut=2),
    "datatrove": lambda path: write_datatrove(path, DOCUMENTS),
    "datatrove, uint32": lambda path: write_datatrove(path, DOCUMENTS, "<u4"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tokens_and_documents_are_those_of_the_file(config: DataConfig, name: str) -> None:
    folder = Path(config.corpus)
    WRITERS[name](folder / "a")
    write_megatron(folder / "held", [[1, 2, 0]])
    lines: list[str] = []
    manifest = prepare_corpus(config, lines.append)
    assert not any("not read" in line or "do not end" in line for line in lines)
    prepared = open_prepared_data(config)
    split = prepared.train
    assert split.read_tokens(0, split.num_tokens).tolist() == [token for each in DOCUMENTS for token in each]
    (starts,) = read_document_starts(Path(config.prepared), prepared.parts, "train")
    assert starts.tolist() == [0, 4, 6]
    assert (manifest.train.documents, manifest.validation.tokens) == (3, 3)
    assert not list(Path(config.prepared).glob("*.bin"))  # no token is stored twice
    verify_prepared_data(Path(config.prepared))
    assert prepare_corpus(config, lines.append) == manifest
    assert "already prepared" in lines[-1]


def test_text_and_token_files_are_one_corpus(config: DataConfig) -> None:
    folder = Path(config.corpus)
    write_megatron(folder / "a", DOCUMENTS, "<i4")
    (folder / "b.txt").write_text("to be")
    (folder / "held.txt").write_text("not to be")
    prepare_corpus(config, silent)
    prepared = open_prepared_data(config)
    tokens = prepared.train.read_tokens(0, prepared.train.num_tokens).tolist()
    assert tokens == [*(token for each in DOCUMENTS for token in each), *prepared.tokenizer.encode("to be"), 0]


def test_documents_without_an_end_token_are_told(config: DataConfig) -> None:
    write_megatron(Path(config.corpus) / "a", [[5, 6], [7, 0], [8, 9]])
    write_megatron(Path(config.corpus) / "held", [[1, 2, 0]])
    lines: list[str] = []
    prepare_corpus(config, lines.append)
    assert "a.bin: 2 of 3 documents do not end with the end token" in lines


def test_a_changed_index_is_read_again(config: DataConfig) -> None:
    write_megatron(Path(config.corpus) / "a", [[5, 6, 0, 7, 0]])
    write_megatron(Path(config.corpus) / "held", [[1, 2, 0]])
    assert prepare_corpus(config, silent).train.documents == 1
    write_megatron(Path(config.corpus) / "a", [[5, 6, 0], [7, 0]])
    assert prepare_corpus(config, silent).train.documents == 2


def refusal(config: DataConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_corpus(config, silent)
    return str(caught.value)


def test_another_tokenizer_and_settings_for_text_are_refused(config: DataConfig) -> None:
    write_megatron(Path(config.corpus) / "a", [[5, 6, 300, 0]])
    write_megatron(Path(config.corpus) / "held", [[1, 2, 0]])
    assert "a.bin = 300: is a token of it, and the tokenizer has 260 ids" in refusal(config)
    assert "data.tokenizer = None: must name the tokenizer" in refusal(
        replace(config, tokenizer=None, eos_token=None, vocab_size=260)
    )
    message = refusal(replace(config, validation=(), validation_fraction=0.1, fim_rate=0.1))
    assert "data.validation_fraction = 0.1: is for text" in message
    assert "data.fim_rate = 0.1: is for text" in message


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no magic": (lambda folder: (folder / "a.idx").write_bytes(b"x" * 100), "is no index of Megatron"),
    "cut index": (lambda folder: (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes()[:60]), "is cut short"),
    "cut tokens": (lambda folder: (folder / "a.bin").write_bytes(bytes(6)), "and a.bin has 6 bytes"),
    "dtype": (lambda folder: _patch(folder / "a.idx", 17, b"\x07"), "dtype = 7"),
    "pointer": (lambda folder: _patch(folder / "a.idx", 34 + 12, b"\x02"), "do not follow each other"),
    "documents": (lambda folder: _patch(folder / "a.idx", -8, b"\x02"), "documents that do not follow"),
    "length": (lambda folder: _patch(folder / "a.idx", 34, b"\xff\xff\xff\xff"), "do not follow each other"),
}


def _patch(path: Path, place: int, raw: bytes) -> None:
    whole = bytearray(path.read_bytes())
    place %= len(whole)
    whole[place : place + len(raw)] = raw
    path.write_bytes(whole)


@pytest.mark.parametrize("name", DAMAGE)
def test_an_index_that_does_not_fit_is_refused(config: DataConfig, name: str) -> None:
    damage, gist = DAMAGE[name]
    write_megatron(Path(config.corpus) / "a", DOCUMENTS)
    write_megatron(Path(config.corpus) / "held", [[1, 2, 0]])
    damage(Path(config.corpus))
    message = refusal(config)
    assert "a.idx" in message
    assert gist in message


def test_an_index_of_datatrove_that_does_not_fit_is_refused(config: DataConfig) -> None:
    write_datatrove(Path(config.corpus) / "a", DOCUMENTS)
    write_datatrove(Path(config.corpus) / "held", [[1, 2, 0]])
    (Path(config.corpus) / "a.ds").write_bytes(bytes(9))
    assert "do not fit a file of 9 bytes" in refusal(config)
    (Path(config.corpus) / "a.ds.index").write_bytes(bytes(9))
    assert "must hold 8 bytes for each document" in refusal(config)
