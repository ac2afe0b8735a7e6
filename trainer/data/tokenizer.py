"""Byte-level BPE: any text to tokens and back without loss."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context, read_regular_file
from ...comm.files.strict_json import MalformedFileError, parse_json

END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
MAX_TOKENIZER_BYTES = 2**28
"""Largest `tokenizer.json` that is read; DeepSeek-V3's has 8 MB."""


@dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE. Text that spells a special token is encoded as text, never as that token."""

    bpe: tokenizers.Tokenizer
    end_token_id: int
    """Token after each document."""
    pad_token_id: int
    """Token that fills a window after the last token of a split."""

    @classmethod
    def from_bpe(cls, bpe: tokenizers.Tokenizer) -> "Tokenizer":
        """Wrap a BPE that has the two special tokens; raises `ValueError` for one without them."""
        end, pad = bpe.token_to_id(END_TOKEN), bpe.token_to_id(PAD_TOKEN)
        if end is None or pad is None:
            raise ValueError(f"the special tokens {END_TOKEN} and {PAD_TOKEN} are missing")
        bpe.encode_special_tokens = True  # not kept in the file: a document may hold the letters `<|end|>`
        return cls(bpe, end, pad)

    @property
    def vocab_size(self) -> int:
        """Number of entries, including the special tokens."""
        return self.bpe.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without an end token."""
        return self.bpe.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, computed on all cores."""
        return [encoding.ids for encoding in self.bpe.encode_batch(list(texts))]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, with special tokens by name and an incomplete character as U+FFFD."""
        return self.bpe.decode(list(tokens), skip_special_tokens=False)

    def to_json(self) -> str:
        """Return the text of `tokenizer.json`."""
        return self.bpe.to_str(pretty=True)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a tokenizer on `texts`; equal texts give equal tokenizers.

    Raises `ConfigError` if the texts have too few different words for `vocabulary` entries.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = _word_splitter()
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    tokenizer = Tokenizer.from_bpe(bpe)
    if tokenizer.vocab_size != vocabulary:
        hint = f"cannot be reached: the training text gives {tokenizer.vocab_size} entries; ask for at most that"
        raise ConfigError([Problem("data.vocab_size", vocabulary, hint)])
    return tokenizer


def _word_splitter() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def pretokenize(text: str) -> list[str]:
    """Return the words within which merges are learned, in the byte alphabet."""
    return [word for word, _ in _word_splitter().pre_tokenize_str(text)]


def parse_tokenizer_json(raw: bytes) -> tokenizers.Tokenizer:
    """Parse `tokenizer.json`. Raises `MalformedFileError`."""
    parse_json(raw)["model"].as_mapping()
    with _malformed_on_any_error("is not a tokenizer that the tokenizers library reads"):
        return tokenizers.Tokenizer.from_str(raw.decode("utf-8"))


def encode_with_bpe(bpe: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return the tokens of `text` by an imported tokenizer, without special tokens. Raises `MalformedFileError`.

    A valid file may still fail on a text: an expression that backtracks without end, or a model without an unknown
    token.
    """
    with _malformed_on_any_error("is a tokenizer that cannot encode this text"):
        return bpe.encode(text, add_special_tokens=False).ids


def decode_with_bpe(bpe: tokenizers.Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text of `tokens` by an imported tokenizer, special tokens by name. Raises `MalformedFileError`."""
    with _malformed_on_any_error("is a tokenizer that cannot decode these tokens"):
        return bpe.decode(list(tokens), skip_special_tokens=False)


@contextmanager
def _malformed_on_any_error(hint: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # most failures are plain Exceptions; a Rust panic derives from BaseException
        raise MalformedFileError("", str(error), hint) from error


def load_tokenizer(path: Path, vocabulary: int, sha256: str) -> Tokenizer:
    """Read `tokenizer.json`. Raises `ConfigError` unless it is the file that the shards were made with."""
    if not path.exists():
        raise ConfigError([Problem(str(path), None, "is missing; remove the directory and prepare again")])
    with config_error_context(path, "prepare again", unreadable_fix="make it readable"):
        raw = read_regular_file(path, MAX_TOKENIZER_BYTES)
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        hint = f"is not the tokenizer of these shards, whose SHA-256 is {sha256}; restore it, or prepare again"
        raise ConfigError([Problem(str(path), found, hint)])
    try:
        tokenizer = Tokenizer.from_bpe(parse_tokenizer_json(raw))
    except ValueError as error:
        raise ConfigError([Problem(str(path), str(error), "is not a Shoestring tokenizer; prepare again")]) from error
    if tokenizer.vocab_size != vocabulary:
        hint = f"its number of entries must be the manifest's {vocabulary}; prepare again"
        raise ConfigError([Problem(str(path), tokenizer.vocab_size, hint)])
    return tokenizer
