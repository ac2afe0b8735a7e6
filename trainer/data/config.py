"""Configuration of the training text and of the directory of its tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import Problem

PACKAGED_CORPUS = "shakespeare"
MIN_VOCAB_SIZE = 258  # 256 bytes and two special tokens
MAX_VOCAB_SIZE = 2**32  # what a uint32 shard can name


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data of a run. A corpus directory holds `NAME.txt`, one document, and `NAME.jsonl`, one per line (key `text`)."""

    corpus: str
    """Directory of the corpus files; `shakespeare` means the seven plays that come with the package."""
    prepared: str
    """Directory for the tokenizer and the token shards made from the corpus."""
    vocab_size: int
    """Entries of the byte-level BPE, including two special tokens."""
    validation: tuple[str, ...]
    """Names of the files held out for validation; the other files are trained on."""

    @property
    def corpus_directory(self) -> Path:
        """Directory of the corpus files."""
        if self.corpus == PACKAGED_CORPUS:
            return Path(__file__).parent / "corpus" / PACKAGED_CORPUS
        return Path(self.corpus)

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        if not self.corpus:
            yield Problem("corpus", self.corpus, f"must name a directory, or be {PACKAGED_CORPUS}")
        if not Path(os.path.realpath(self.prepared)).name or not self.prepared:
            yield Problem("prepared", self.prepared, "must name a directory that may be created")
        if self.vocab_size < MIN_VOCAB_SIZE:
            hint = f"must be at least {MIN_VOCAB_SIZE}: 256 bytes and two special tokens"
            yield Problem("vocab_size", self.vocab_size, hint)
        if self.vocab_size > MAX_VOCAB_SIZE:
            yield Problem("vocab_size", self.vocab_size, f"must be at most {MAX_VOCAB_SIZE}, to fit 32 bits")
        if not self.validation:
            hint = "must name at least one file: the loss on training text says little"
            yield Problem("validation", self.validation, hint)
        if len(set(self.validation)) < len(self.validation):
            yield Problem("validation", self.validation, "names a file twice")
