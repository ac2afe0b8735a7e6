"""Tokenizer files of a Hugging Face directory."""

import json
from collections.abc import Mapping

from ...comm.files.strict_json import parse_json
from ..data.tokenizer import END_TOKEN, PAD_TOKEN, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

COPIED_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that an import copies and an export writes back."""


def make_tokenizer_files(
    attachments: Mapping[str, bytes], context: int, eos_token_id: int | None = None
) -> dict[str, bytes]:
    """Return the checkpoint's attachments; without a configuration of the tokenizer add what transformers needs."""
    found = {name: raw for name, raw in attachments.items() if name in COPIED_FILES}
    if TOKENIZER_FILE in found and TOKENIZER_CONFIG_FILE not in found:
        names = {number: token for token, number in _added_tokens(attachments).items()}
        end = names.get(eos_token_id, END_TOKEN) if eos_token_id is not None else END_TOKEN
        tree = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": PAD_TOKEN if PAD_TOKEN in names.values() else end,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
        }
        found[TOKENIZER_CONFIG_FILE] = (json.dumps(tree, indent=2) + "\n").encode()
    return found


def special_token_ids(attachments: Mapping[str, bytes], eos_token_id: object = None) -> dict[str, int | None]:
    """Return `eos_token_id` and `pad_token_id`: the given end token, or those of a Shoestring tokenizer, if present.

    Raises `MalformedFileError`.
    """
    if TOKENIZER_FILE not in attachments:
        return {}
    numbers = _added_tokens(attachments)
    known = (("eos_token_id", END_TOKEN), ("pad_token_id", PAD_TOKEN))
    found: dict[str, int | None] = {key: numbers[token] for key, token in known if token in numbers}
    return found | ({"eos_token_id": eos_token_id} if type(eos_token_id) is int else {})


def _added_tokens(attachments: Mapping[str, bytes]) -> dict[str, int]:
    added = parse_json(attachments[TOKENIZER_FILE]).get("added_tokens")
    tokens = [] if added is None else added.as_list()
    return {each["content"].as_string(): each["id"].as_integer() for each in tokens}
