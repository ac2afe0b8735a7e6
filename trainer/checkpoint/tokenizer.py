"""Tokenizer of a checkpoint or import, for data of a run that starts from its weights."""

from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context
from ..data.tokenizer import END_TOKEN, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, named_eos_token
from .find import find_checkpoint
from .manifest import damage_error_context

_TAKE_ANOTHER = "name another training.start_from"


def load_checkpoint_tokenizer(start_from: Path, eos_token: str | int | None) -> Tokenizer | None:
    """Return the tokenizer of the checkpoint at `start_from`; None if it has none.

    Its end token is `eos_token`, or what its run used, or that of its `tokenizer_config.json` or `config.json`. Raises
    `ConfigError`.
    """
    checkpoint = find_checkpoint(start_from)
    with damage_error_context(f"is damaged; {_TAKE_ANOTHER}"):
        files = checkpoint.read_attachments()
    if TOKENIZER_FILE not in files:
        return None
    with config_error_context(checkpoint.path / TOKENIZER_FILE, _TAKE_ANOTHER):
        config = files.get(TOKENIZER_CONFIG_FILE)
        used = (checkpoint.manifest.metadata, checkpoint.imported_config or {})
        ids = [found["eos_token_id"] for found in used if type(found.get("eos_token_id")) is int]
        candidates = (eos_token, *ids[:1], named_eos_token(config))
        found = next((each for each in candidates if each is not None), None)
        if found is None and f'"{END_TOKEN}"'.encode() in files[TOKENIZER_FILE]:
            found = END_TOKEN
        if found is None:
            hint = f"is needed: the tokenizer of {start_from} does not name the token after a document"
            raise ConfigError([Problem("data.eos_token", None, hint)])
        return Tokenizer.from_json(files[TOKENIZER_FILE], found, config)
