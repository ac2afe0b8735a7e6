"""Byte-level BPE: any text to tokens and back without loss.

A tokenizer is trained here, or is anybody's `tokenizer.json`. Text never gives a control token: `<|end|>` in a document
stays five characters and two bars.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context, read_regular_file
from ...comm.files.strict_json import MalformedFileError, parse_json
from .manifest import DataManifest

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
MAX_TOKENIZER_BYTES = 2**28
"""Largest `tokenizer.json` that is read; DeepSeek-V3's has 8 MB."""
_FIM_TOKENS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
"""Control tokens before prefix, suffix and middle: of DeepSeek, StarCoder and Qwen."""
_CONTROL_TOKEN = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""Spelling of control tokens. `special` does not tell: DeepSeek's for chat and fill-in-the-middle are not special.
Other added tokens, such as runs of blanks, are text."""


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer of a `tokenizer.json`, without its template for the begin and end of a text."""

    raw: bytes
    """Content of `tokenizer.json`."""
    config: bytes | None
    """Content of the `tokenizer_config.json` beside it, if any."""
    encoder: tokenizers.Tokenizer
    """Tokenizer that knows no control token."""
    decoder: tokenizers.Tokenizer
    """Tokenizer with all tokens."""
    eos_token_id: int
    """Token after each document."""
    vocab_size: int
    """One more than the largest token id."""

    @staticmethod
    def from_json(raw: bytes, eos_token: str | int, config: bytes | None = None) -> "Tokenizer":
        """Build from the content of `tokenizer.json`.

        `eos_token` is a token or its id. Raises `MalformedFileError` for another file, an unknown end token, and a
        tokenizer in which text can give a control token.
        """
        decoder = parse_tokenizer_json(raw)
        ids = decoder.get_vocab(with_added_tokens=True)
        eos = ids.get(eos_token) if isinstance(eos_token, str) else eos_token
        if eos is None or eos not in ids.values():
            raise MalformedFileError("", eos_token, "is no token of the tokenizer; set data.eos_token")
        tokenizer = Tokenizer(raw, config, _without_control_tokens(raw), decoder, eos, max(ids.values()) + 1)
        _check_control_tokens(tokenizer)
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file's content."""
        return Tokenizer.from_json, (self.raw, self.eos_token_id, self.config)

    @property
    def pad_token_id(self) -> int:
        """Token that fills a window after the last token of a split, where no loss is computed."""
        found = self.decoder.token_to_id(PAD_TOKEN)
        return self.eos_token_id if found is None else found

    @property
    def files(self) -> dict[str, bytes]:
        """Content of its files by name."""
        config = {} if self.config is None else {TOKENIZER_CONFIG_FILE: self.config}
        return {TOKENIZER_FILE: self.raw} | config

    @property
    def entries(self) -> int:
        """Number of different tokens; ids may be left out."""
        return self.decoder.get_vocab_size(with_added_tokens=True)

    @cached_property
    def control_tokens(self) -> dict[int, str]:
        """Names of the tokens that no text gives, by id."""
        text = self.encoder.get_added_tokens_decoder()
        added = self.decoder.get_added_tokens_decoder().items()
        return {number: token.content for number, token in added if number not in text}

    def fim_token_ids(self, names: Sequence[str] | None) -> tuple[int, ...]:
        """Return the control tokens before prefix, suffix and middle, given by `names` or those that are known.

        Raises `ConfigError` if the tokenizer has none.
        """
        for candidates in [tuple(names)] if names is not None else _FIM_TOKENS:
            ids = [number for name in candidates if (number := self.decoder.token_to_id(name)) is not None]
            if len(ids) == len(candidates):
                return tuple(ids)
        hint = (
            "are no tokens of the tokenizer; name its tokens before prefix, suffix and middle, or set data.fim_rate=0"
        )
        raise ConfigError([Problem("data.fim_tokens", names, hint)])

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without an end token."""
        return self.encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        # `_fast` leaves out the places of tokens in the text, which takes a third of the time.
        return [each.ids for each in self.encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, with control tokens by name and an incomplete character as U+FFFD."""
        return self.decoder.decode(list(tokens), skip_special_tokens=False)


def _is_control_token(token: dict[str, Any]) -> bool:
    return bool(token.get("special")) or _CONTROL_TOKEN.fullmatch(token["content"]) is not None


def _without_control_tokens(raw: bytes) -> tokenizers.Tokenizer:
    tree = json.loads(raw)
    tree["added_tokens"] = [token for token in tree.get("added_tokens") or [] if not _is_control_token(token)]
    tree |= {"post_processor": None, "truncation": None, "padding": None}
    vocabulary = tree["model"].get("vocab")
    control = {token["content"] for token in json.loads(raw).get("added_tokens") or [] if _is_control_token(token)}
    if isinstance(vocabulary, dict) and tree["model"].get("ignore_merges"):
        # Such a model looks whole words up in its vocabulary before it merges.
        tree["model"]["vocab"] = {word: number for word, number in vocabulary.items() if word not in control}
    with _malformed_on_any_error("is not a tokenizer that the tokenizers library reads"):
        return tokenizers.Tokenizer.from_str(json.dumps(tree))


def _check_control_tokens(tokenizer: Tokenizer) -> None:
    """Raise `MalformedFileError` if the spelling of a control token is encoded as that token."""
    names = tokenizer.control_tokens
    with _malformed_on_any_error("is a tokenizer that cannot encode the names of its control tokens"):
        found = tokenizer.encode_batch(list(names.values()))
    for (number, name), tokens in zip(names.items(), found, strict=True):
        if number in tokens:
            raise MalformedFileError("", name, "is a control token that its spelling in a text would give")


def count_token_ids(path: Path) -> int:
    """Return one more than the largest token id of a `tokenizer.json` or its directory. Raises `ConfigError`."""
    file = _tokenizer_file(path)
    with config_error_context(file, "take another tokenizer"):
        ids = parse_tokenizer_json(read_regular_file(file, MAX_TOKENIZER_BYTES)).get_vocab(with_added_tokens=True)
    return max(ids.values(), default=0) + 1


def _tokenizer_file(path: Path) -> Path:
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.exists():
        hint = f"has no {TOKENIZER_FILE}" if path.is_dir() else "does not exist; name a tokenizer.json or its directory"
        raise ConfigError([Problem("data.tokenizer", str(path), hint)])
    return file


def load_tokenizer_file(path: Path, eos_token: str | int | None) -> Tokenizer:
    """Read a `tokenizer.json`, or that of a Hugging Face directory.

    `eos_token` is a token or its id; None takes the one of `tokenizer_config.json` beside the file.
    Raises `ConfigError`.
    """
    file = _tokenizer_file(path)
    config_file = file.with_name(TOKENIZER_CONFIG_FILE)
    with config_error_context(file, "take another tokenizer"):
        raw = read_regular_file(file, MAX_TOKENIZER_BYTES)
        config = read_regular_file(config_file, MAX_TOKENIZER_BYTES) if config_file.exists() else None
        eos_token = eos_token if eos_token is not None else named_eos_token(config)
        if eos_token is None:
            hint = f"is needed: {file} has no {TOKENIZER_CONFIG_FILE} beside it that names the token after a document"
            raise ConfigError([Problem("data.eos_token", None, hint)])
        return Tokenizer.from_json(raw, eos_token, config)


def named_eos_token(config: bytes | None) -> str | None:
    """Return the end token that a `tokenizer_config.json` names; None if it names none. Raises `MalformedFileError`."""
    found = None if config is None else parse_json(config).get("eos_token")
    if found is None:
        return None
    return found["content"].as_string() if isinstance(found.value, dict) else found.as_string()


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
    tokenizer = Tokenizer.from_json(bpe.to_str(pretty=True).encode(), END_TOKEN)
    if tokenizer.vocab_size != vocabulary:
        hint = f"cannot be reached: the training text gives {tokenizer.vocab_size} entries; ask for at most that"
        raise ConfigError([Problem("data.vocab_size", vocabulary, hint)])
    return tokenizer


def _word_splitter() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


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


def load_prepared_tokenizer(directory: Path, manifest: DataManifest) -> Tokenizer:
    """Read the tokenizer of a prepared directory. Raises `ConfigError` unless the shards were made with it."""
    path = directory / manifest.tokenizer.file
    if not path.exists():
        raise ConfigError([Problem(str(path), None, "is missing; remove the directory and prepare again")])
    with config_error_context(path, "prepare again", unreadable_fix="make it readable"):
        raw = read_regular_file(path, MAX_TOKENIZER_BYTES)
        found = hashlib.sha256(raw).hexdigest()
        if found != manifest.tokenizer.sha256:
            hint = f"is not the tokenizer of these shards, whose SHA-256 is {manifest.tokenizer.sha256}; restore it"
            raise MalformedFileError("", found, hint)
        named = manifest.tokenizer_config
        config = None if named is None else read_regular_file(directory / named.file, MAX_TOKENIZER_BYTES)
        return Tokenizer.from_json(raw, manifest.settings.eos_token_id, config)
