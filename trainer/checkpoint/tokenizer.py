"""Tokenizer of a checkpoint or import, and that of a run, which may be the one of the weights it starts from."""

from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context
from ..config import RunConfig
from ..data.tokenizer import (
    END_TOKEN,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer_file,
    named_eos_token,
    parse_tokenizer_json,
)
from .checkpoint import Checkpoint
from .find import find_checkpoint
from .manifest import damage_error_context

_TAKE_ANOTHER = "name another training.start_from"


def find_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Return the tokenizer of `data.tokenizer`, or that of `training.start_from`; None if one is to be trained.

    Raises `ConfigError` for a tokenizer that is missing, damaged or has more token ids than the model has rows.
    """
    data, start_from = config.data, config.training.start_from
    if data.tokenizer is not None:
        found, field = load_tokenizer_file(Path(data.tokenizer), data.eos_token), "data.tokenizer"
    elif start_from is not None:
        tokenizer, field = load_checkpoint_tokenizer(Path(start_from), data.eos_token), "training.start_from"
        if tokenizer is None:
            return None
        found = tokenizer
    else:
        return None
    if found.vocab_size > config.model.vocab_size:
        hint = f"has {found.vocab_size} token ids, more than model.vocab_size = {config.model.vocab_size}"
        fix = "raise that, or set model.vocab_size=null, which follows the tokenizer"
        raise ConfigError([Problem(field, data.tokenizer or start_from, f"{hint}; {fix}")])
    return found


def load_checkpoint_tokenizer(start_from: Path, eos_token: str | int | None) -> Tokenizer | None:
    """Return the tokenizer of the checkpoint at `start_from`; None if it has none.

    Its end token is `eos_token`, or else that of the checkpoint. Raises `ConfigError`.
    """
    checkpoint = find_checkpoint(start_from)
    if not has_tokenizer(checkpoint):
        return None
    with damage_error_context(f"is damaged; {_TAKE_ANOTHER}"):
        files = checkpoint.read_attachments()
    with config_error_context(checkpoint.path / TOKENIZER_FILE, _TAKE_ANOTHER):
        end = checkpoint_eos_token_id(checkpoint) if eos_token is None else eos_token
        if end is None:
            hint = f"is needed: the tokenizer of {start_from} does not name the token after each document"
            raise ConfigError([Problem("data.eos_token", None, hint)])
        return Tokenizer.from_json(files[TOKENIZER_FILE], end, files.get(TOKENIZER_CONFIG_FILE))


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Return whether a `tokenizer.json` is attached to the checkpoint."""
    return any(entry.file == TOKENIZER_FILE for entry in checkpoint.manifest.attachments)


def checkpoint_eos_token_id(checkpoint: Checkpoint) -> int | None:
    """Return the token after each document; None if nothing names it.

    A run saves the one of its data. An import names it in `config.json` or `tokenizer_config.json`. Raises
    `MalformedFileError`, `CheckpointDamaged` and `ConfigError`.
    """
    if checkpoint.run_eos_token_id is not None:
        return checkpoint.run_eos_token_id
    named = (checkpoint.imported_config or {}).get("eos_token_id")
    if type(named) is int and named >= 0:  # it may be a list; -1: none, in older files
        return named
    if not has_tokenizer(checkpoint):
        return None
    files = checkpoint.read_attachments()
    ids = parse_tokenizer_json(files[TOKENIZER_FILE])
    end: int | None = ids.token_to_id(named_eos_token(files.get(TOKENIZER_CONFIG_FILE)) or END_TOKEN)
    return end
