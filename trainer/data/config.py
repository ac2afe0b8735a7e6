"""Configuration of the training text and of the directory of its tokens."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from ...comm.errors import Problem
from ...comm.files.ranges import CheckedConfig, at_least, between, fraction, not_empty

PACKAGED_CORPUS = "shakespeare"
MIN_VOCAB_SIZE = 258  # 256 bytes and two control tokens
MAX_VOCAB_SIZE = 2**32  # what a uint32 shard can name
_FIM_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class DataConfig(CheckedConfig):
    """Data of a run: where the text is, how it becomes tokens, and where they are."""

    corpus: str = not_empty(hint=f"must name a file, folder or glob, or be {PACKAGED_CORPUS}")
    """File, folder (with all below) or glob: `*.txt` (one document), `*.jsonl` (one a line), `*.parquet` (one a row),
    the first two also as .gz or .zst; a path, `s3://` or `gs://`. `shakespeare`: seven plays of the package."""
    text_key: str = not_empty("text")
    """Key or column of the text in JSON lines and Parquet."""
    tokenizer: str | None = None
    """A `tokenizer.json`, or a Hugging Face directory with one; null takes that of `training.start_from`, or trains a
    byte-level BPE of `vocab_size` entries."""
    eos_token: str | int | None = None
    """Token after each document, by name or id; null takes that of the `tokenizer_config.json` beside the tokenizer."""
    vocab_size: int | None = between(
        MIN_VOCAB_SIZE,
        MAX_VOCAB_SIZE,
        None,
        least_reason=": 256 bytes and two control tokens",
        most_reason=", to fit 32 bits",
        null="with a tokenizer that is not trained",
    )
    """Entries of the byte-level BPE that is trained, including two control tokens; null with any other tokenizer."""
    prepared: str
    """Directory for the tokenizer and the token shards made from the corpus."""
    validation: tuple[str, ...] = ()
    """Files held out for validation, by path in the corpus, name without suffix, or glob; the rest is trained on."""
    validation_fraction: float = fraction(0.0)
    """Share of the documents held out for validation instead of whole files, chosen by hash."""
    max_bad_records: int = at_least(0, 0)
    """Broken records that may be skipped: not JSON, not UTF-8, without the key."""
    seed: int = at_least(0, 0)
    """Seed of the choices that are made for each document."""
    shuffle: bool = True
    """Shuffle the documents of a file, within buckets of 8 M tokens. Samples are shuffled in any case."""
    fim_rate: float = between(0, 1, 0.0)
    """Share of the documents that are reordered for fill-in-the-middle; the report has 0.1 (§4.1)."""
    fim_tokens: tuple[str, ...] | None = None
    """Tokens before prefix, suffix and middle; null takes DeepSeek's, StarCoder's or Qwen's if they exist."""
    token_split_rate: float = between(0, 1, 0.0)
    """Share of the tokens that join punctuation and line breaks which are split (report §4.1, which gives no share)."""
    workers: int | None = at_least(1, None, null="for all cores")
    """Most processes that prepare (one up to 8 MB of text); any number gives the same files. Executors: `--jobs`."""
    license: str | None = None
    """License of the text, written into the manifest."""

    @property
    def corpus_location(self) -> str:
        """Place of the corpus files."""
        if self.corpus == PACKAGED_CORPUS:
            return str(Path(__file__).parent / "corpus" / PACKAGED_CORPUS)
        return self.corpus

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if not Path(os.path.realpath(self.prepared)).name or not self.prepared:
            yield Problem("prepared", self.prepared, "must name a directory that may be created")
        if len(set(self.validation)) < len(self.validation):
            yield Problem("validation", self.validation, "names a file twice")
        if self.validation and self.validation_fraction > 0:
            hint = "must be 0 while data.validation names files; choose one of them (data.validation=[] is none)"
            yield Problem("validation_fraction", self.validation_fraction, hint, ("validation",))
        elif not self.validation and self.validation_fraction == 0:
            hint = "must name at least one file, or set data.validation_fraction: the loss on training text says little"
            yield Problem("validation", self.validation, hint, ("validation_fraction",))
        yield from self._tokenizer_problems()
        if self.fim_tokens is not None and len(set(self.fim_tokens)) != _FIM_TOKENS:
            hint = "must name three different tokens: before prefix, suffix and middle"
            yield Problem("fim_tokens", self.fim_tokens, hint)

    def _tokenizer_problems(self) -> Iterator[Problem]:
        if self.tokenizer == "":
            yield Problem("tokenizer", self.tokenizer, "must name a tokenizer.json or its directory, or be null")
        if self.eos_token == "" or (isinstance(self.eos_token, int) and self.eos_token < 0):
            yield Problem("eos_token", self.eos_token, "must be a token or its id, at least 0, or null")
        if self.vocab_size is None:
            return
        if self.tokenizer is not None:
            hint = "is for a tokenizer that is trained here, and data.tokenizer names one: set data.vocab_size=null"
            yield Problem("vocab_size", self.vocab_size, hint, ("tokenizer",))
            return
        trained = f"the tokenizer that is trained here (data.vocab_size = {self.vocab_size})"
        if self.eos_token is not None:
            hint = f"has no effect: {trained} has its own end token; set it to null, or data.vocab_size for another one"
            yield Problem("eos_token", self.eos_token, hint, ("vocab_size", "tokenizer"))
        if self.fim_rate > 0:
            hint = f"must be 0: {trained} has no tokens for fill-in-the-middle; use another one, data.vocab_size=null"
            yield Problem("fim_rate", self.fim_rate, hint, ("vocab_size", "tokenizer"))
