"""Byte-level BPE: any text to tokens and back without loss.

A tokenizer is trained here, or is anybody's `tokenizer.json`. Text never gives a control token: `<|end|>` in a document
stays five characters and two bars.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
_CONTROL_TOKEN = re.compile(r"[<\[|｜].*\w|\w.*[|｜]", re.DOTALL)
"""Spelling of control tokens: a bracket or bar and a name, as in `<think>`, `</s>`, `<dsml:`, `[PAD]` and `｜DSML｜`.
`special` does not tell: DeepSeek's tokens for chat and fill-in-the-middle are not special. Other added tokens, such as
runs of blanks and words, are text."""


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer of a `tokenizer.json`, without its template for the begin and end of a text."""

    raw: bytes
    """Content of `tokenizer.json`."""
    config: bytes | None
    """Content of the `tokenizer_config.json` beside it, if any."""
    encoder: tokenizers.Tokenizer
    """Tokenizer that knows no control token."""
    control_tokens: Mapping[int, str]
    """Names of the tokens that no text gives, the end token among them, by id."""
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
        decoder = parse_tokenizer_json(raw)  # the library refuses what is wrong in the tree that is read below
        tree = json.loads(raw)
        ids = _token_ids(tree)
        if set(decoder.get_added_tokens_decoder()) != {token["id"] for token in _added_tokens(tree)}:
            hint = "has added tokens whose ids do not follow each other; the tokenizers library would change them"
            raise MalformedFileError("added_tokens", None, hint)
        eos = ids.get(eos_token) if isinstance(eos_token, str) else eos_token
        if eos is None or eos not in ids.values():
            raise MalformedFileError(
                "data.eos_token", eos_token, "is no token of the tokenizer; name another, or its id"
            )
        removed = {token["content"] for token in _added_tokens(tree) if _is_control(token, eos)}
        encoder = _library_tokenizer(json.dumps(_without_tokens(tree, removed)))
        # What the model gives for unknown text is for text to give.
        names = removed - {_unknown_token(tree)}
        control = {number: name for name, number in ids.items() if name in names or number == eos}
        _check_encoder(encoder, control, [token for token in _added_tokens(tree) if token["content"] not in removed])
        tokenizer = Tokenizer(raw, config, encoder, control, eos, max(ids.values()) + 1)
        tokenizer.__dict__["decoder"] = decoder
        return tokenizer

    @cached_property
    def decoder(self) -> tokenizers.Tokenizer:
        """Tokenizer with all tokens."""
        return parse_tokenizer_json(self.raw)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the decoder: processes that only encode, start a second earlier with DeepSeek's vocabulary."""
        return {name: value for name, value in self.__dict__.items() if name != "decoder"}

    @property
    def pad_token_id(self) -> int:
        """Token that fills a window after the last token of a split, where no loss is computed."""
        found = self.decoder.token_to_id(PAD_TOKEN)
        return self.eos_token_id if found is None else found

    def token_id(self, name: str) -> int | None:
        """Return the id of a token; None if there is none of this name."""
        found: int | None = self.decoder.token_to_id(name)
        return found

    @property
    def entries(self) -> int:
        """Number of different tokens; ids may be left out."""
        return self.decoder.get_vocab_size(with_added_tokens=True)

    @property
    def files(self) -> dict[str, bytes]:
        """Content of its files by name."""
        config = {} if self.config is None else {TOKENIZER_CONFIG_FILE: self.config}
        return {TOKENIZER_FILE: self.raw} | config

    def fim_token_ids(self, names: Sequence[str] | None) -> tuple[int, ...]:
        """Return the control tokens before prefix, suffix and middle, given by `names` or those that are known.

        Raises `ConfigError` if the tokenizer has none.
        """
        for candidates in [tuple(names)] if names is not None else _FIM_TOKENS:
            ids = [number for name in candidates if (number := self.token_id(name)) in self.control_tokens]
            if len(ids) == len(candidates):
                return tuple(number for number in ids if number is not None)
        hint = "name three control tokens of the tokenizer, before prefix, suffix and middle, or set data.fim_rate=0"
        raise ConfigError([Problem("data.fim_tokens", names, hint)])

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without an end token. Raises `ConfigError` for text that cannot be encoded."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text. Raises `ConfigError` for text that the tokenizer cannot encode."""
        try:
            with _malformed_on_any_error("is a tokenizer that cannot encode some text; take another"):
                # `_fast` leaves out the places of tokens in the text, which takes a third of the time.
                return [each.ids for each in self.encoder.encode_batch_fast(list(texts), add_special_tokens=False)]
        except MalformedFileError as error:
            raise ConfigError([Problem("data.tokenizer", error.value, error.hint)]) from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, with control tokens by name and an incomplete character as U+FFFD."""
        return self.decoder.decode(list(tokens), skip_special_tokens=False)


def _added_tokens(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    return tree.get("added_tokens") or []


def _is_control(token: Mapping[str, Any], eos_token_id: int) -> bool:
    return token["special"] or token["id"] == eos_token_id or _CONTROL_TOKEN.search(token["content"]) is not None


def _token_ids(tree: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of every token by name."""
    vocabulary = tree["model"]["vocab"]
    # A Unigram model has a list of pieces with scores, the others a mapping.
    ids = (
        vocabulary if isinstance(vocabulary, dict) else {piece: number for number, (piece, _) in enumerate(vocabulary)}
    )
    return {**ids, **{token["content"]: token["id"] for token in _added_tokens(tree)}}


def _unknown_token(tree: Mapping[str, Any]) -> str | None:
    model = tree["model"]
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    found: str | None = model.get("unk_token")
    return found


def _without_tokens(tree: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a `tokenizer.json` that cannot give the tokens `names`, and adds nothing to a text.

    The other tokens keep their ids, for which the library takes no number from the file but counts added tokens.
    """
    model, others = dict(tree["model"]), [token for token in _added_tokens(tree) if token["content"] not in names]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        gone = set(names) - {_unknown_token(tree)}
        kept = {name: number for name, number in vocabulary.items() if name not in gone}
        model["vocab"] = kept | {token["content"]: token["id"] for token in others}
        if gone & vocabulary.keys() and model.get("merges"):
            prefix = model.get("continuing_subword_prefix") or ""
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [
                pair for pair in pairs if gone.isdisjoint((*pair, pair[0] + pair[1].removeprefix(prefix)))
            ]
    else:  # ids are places in the list; no text contains a piece without characters
        model["vocab"] = [["" if piece in names else piece, score] for piece, score in vocabulary]
    return {
        **tree,
        "model": model,
        "added_tokens": others,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _check_encoder(
    encoder: tokenizers.Tokenizer, control: Mapping[int, str], others: Sequence[Mapping[str, Any]]
) -> None:
    """Raise `MalformedFileError` if the name of a control token gives one, or if another added token has a new id."""
    with _malformed_on_any_error("is a tokenizer that cannot encode the names of its control tokens"):
        found = encoder.encode_batch_fast(list(control.values()), add_special_tokens=False)
    for name, tokens in zip(control.values(), found, strict=True):
        if not control.keys().isdisjoint(tokens.ids):
            raise MalformedFileError("", name, "is a control token that text with its letters gives")
    for token in others:
        if encoder.token_to_id(token["content"]) != token["id"]:
            raise MalformedFileError("added_tokens", token["content"], "gets another id without control tokens")


def load_tokenizer_file(path: Path, eos_token: str | int | None) -> Tokenizer:
    """Read `data.tokenizer`: a `tokenizer.json`, or that of a Hugging Face directory.

    `eos_token` is a token or its id; None takes the one of `tokenizer_config.json` beside the file.
    Raises `ConfigError`.
    """
    file = _tokenizer_file(path)
    config_file = file.with_name(TOKENIZER_CONFIG_FILE)
    config = None
    if config_file.exists():
        with config_error_context(config_file, "correct it, or remove it and set data.eos_token"):
            config = read_regular_file(config_file, MAX_TOKENIZER_BYTES)
            eos_token = named_eos_token(config) if eos_token is None else eos_token
    if eos_token is None:
        hint = f"is needed: no {TOKENIZER_CONFIG_FILE} beside {file} names the token after each document"
        raise ConfigError([Problem("data.eos_token", None, hint)])
    raw = read_tokenizer_json(path)
    with config_error_context(file, "take another tokenizer"):
        return Tokenizer.from_json(raw, eos_token, config)


def count_token_ids(path: Path) -> int:
    """Return one more than the largest token id of `data.tokenizer`. Raises `ConfigError`."""
    raw = read_tokenizer_json(path)
    with config_error_context(_tokenizer_file(path), "take another tokenizer"):
        return max(parse_tokenizer_json(raw).get_vocab(with_added_tokens=True).values(), default=0) + 1


def read_tokenizer_json(path: Path) -> bytes:
    """Return the content of the `tokenizer.json` that `data.tokenizer` names. Raises `ConfigError`."""
    file = _tokenizer_file(path)
    with config_error_context(file, "take another tokenizer"):
        return read_regular_file(file, MAX_TOKENIZER_BYTES)


def _tokenizer_file(path: Path) -> Path:
    """Return the file of `data.tokenizer`. Raises `ConfigError` if it does not exist."""
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.exists():
        hint = f"has no {TOKENIZER_FILE}" if path.is_dir() else "does not exist"
        fix = f"name a {TOKENIZER_FILE}, or a Hugging Face directory with one"
        raise ConfigError([Problem("data.tokenizer", str(path), f"{hint}; {fix}")])
    return file


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
    return _library_tokenizer(raw.decode("utf-8"))


def _library_tokenizer(text: str) -> tokenizers.Tokenizer:
    with _malformed_on_any_error("is not a tokenizer that the tokenizers library reads"):
        return tokenizers.Tokenizer.from_str(text)


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
        tokenizer = Tokenizer.from_json(raw, manifest.settings.eos_token_id, config)
        if tokenizer.vocab_size != manifest.settings.vocab_size:
            hint = f"its number of token ids must be the manifest's {manifest.settings.vocab_size}"
            raise MalformedFileError("", tokenizer.vocab_size, hint)
    return tokenizer
