"""Tokenizer files of a Hugging Face directory."""

import json
from collections.abc import Mapping

from ...comm.files.strict_json import parse_json
from ..data.tokenizer import (
    END_TOKEN,
    PAD_TOKEN,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    named_eos_token,
    parse_tokenizer_json,
)

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
    """Return the tokenizer files of an export, with the configuration that transformers needs.

    `eos_token_id` is the end token of the run's data; None leaves the files of an import as they are. Raises
    `MalformedFileError`.
    """
    found = {name: raw for name, raw in attachments.items() if name in COPIED_FILES}
    if TOKENIZER_FILE not in found:
        return found
    config = found.get(TOKENIZER_CONFIG_FILE)
    if config is None or eos_token_id is not None:
        tokens = parse_tokenizer_json(found[TOKENIZER_FILE]).get_vocab(with_added_tokens=True)
        names = {number: token for token, number in tokens.items()}
        end = names.get(eos_token_id) if eos_token_id is not None else END_TOKEN
        if config is None:
            tree: dict[str, object] = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": end,
                "pad_token": PAD_TOKEN,
                "model_max_length": context,
                "clean_up_tokenization_spaces": False,
            }
            # transformers adds a token that does not exist, beyond the rows of the model.
            tree = {key: value for key, value in tree.items() if not key.endswith("_token") or value in tokens}
            found[TOKENIZER_CONFIG_FILE] = _to_json(tree)
        elif named_eos_token(config) != end:  # the run named another in data.eos_token
            found[TOKENIZER_CONFIG_FILE] = _to_json({**parse_json(config).as_mapping(), "eos_token": end})
    return found


def _to_json(tree: Mapping[str, object]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


def special_token_ids(attachments: Mapping[str, bytes], eos_token_id: int | None = None) -> dict[str, int | None]:
    """Return `eos_token_id` and `pad_token_id`: the given end token, or those of a Shoestring tokenizer, if present.

    Raises `MalformedFileError`.
    """
    if TOKENIZER_FILE not in attachments:
        return {}
    added = parse_json(attachments[TOKENIZER_FILE]).get("added_tokens")
    tokens = [] if added is None else added.as_list()
    numbers = {each["content"].as_string(): each["id"].as_integer() for each in tokens}
    end = numbers.get(END_TOKEN) if eos_token_id is None else eos_token_id
    known = {"eos_token_id": end, "pad_token_id": numbers.get(PAD_TOKEN)}
    return {key: number for key, number in known.items() if number is not None}
