"""Tokenizer files of a Hugging Face directory."""

import json
from collections.abc import Mapping

from ...comm.files.strict_json import parse_json
from ..data.tokenizer import END_TOKEN, PAD_TOKEN

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
COPIED_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that an import copies and an export writes back."""


def make_tokenizer_files(attachments: Mapping[str, bytes], context: int) -> dict[str, bytes]:
    """Return the checkpoint's attachments; for a Shoestring tokenizer add the configuration that transformers needs."""
    found = {name: raw for name, raw in attachments.items() if name in COPIED_FILES}
    if TOKENIZER_FILE in found and TOKENIZER_CONFIG_FILE not in found:
        tree = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_TOKEN,
            "pad_token": PAD_TOKEN,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
        }
        found[TOKENIZER_CONFIG_FILE] = (json.dumps(tree, indent=2) + "\n").encode()
    return found


def special_token_ids(attachments: Mapping[str, bytes]) -> dict[str, int | None]:
    """Return `eos_token_id` and `pad_token_id` of a Shoestring tokenizer, if present. Raises `MalformedFileError`."""
    if TOKENIZER_FILE not in attachments:
        return {}
    added = parse_json(attachments[TOKENIZER_FILE]).get("added_tokens")
    tokens = [] if added is None else added.as_list()
    numbers = {each["content"].as_string(): each["id"].as_integer() for each in tokens}
    known = (("eos_token_id", END_TOKEN), ("pad_token_id", PAD_TOKEN))
    return {key: numbers[token] for key, token in known if token in numbers}
