"""Configuration of the training text and of the directory of its tokens."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from ...comm.errors import Problem
from ...comm.files.ranges import CheckedConfig, between, not_empty

PACKAGED_CORPUS = "shakespeare"
MIN_VOCAB_SIZE = 258  # 256 bytes and two special tokens
MAX_VOCAB_SIZE = 2**32  # what a uint32 shard can name


@dataclass(frozen=True, kw_only=True)
class DataConfig(CheckedConfig):
    """Data of a run. A corpus directory holds `NAME.txt`, one document, and `NAME.jsonl`, one per line (key `text`)."""

    corpus: str = not_empty(hint=f"must name a directory, or be {PACKAGED_CORPUS}")
    """Directory of the corpus files; `shakespeare` means the seven plays that come with the package."""
    prepared: str
    """Directory for the tokenizer and the token shards made from the corpus."""
    vocab_size: int = between(
        MIN_VOCAB_SIZE,
        MAX_VOCAB_SIZE,
        least_reason=": 256 bytes and two special tokens",
        most_reason=", to fit 32 bits",
    )
    """Entries of the byte-level BPE, including two special tokens."""
    validation: tuple[str, ...] = not_empty(hint="must name at least one file: the loss on training text says little")
    """Names of the files held out for validation; the other files are trained on."""

    @property
    def corpus_directory(self) -> Path:
        """Directory of the corpus files."""
        if self.corpus == PACKAGED_CORPUS:
            return Path(__file__).parent / "corpus" / PACKAGED_CORPUS
        return Path(self.corpus)

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if not Path(os.path.realpath(self.prepared)).name or not self.prepared:
            yield Problem("prepared", self.prepared, "must name a directory that may be created")
        if len(set(self.validation)) < len(self.validation):
            yield Problem("validation", self.validation, "names a file twice")
