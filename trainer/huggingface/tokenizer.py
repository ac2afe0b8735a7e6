"""The files beside the weights that make a tokenizer of them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...comm.files.strict_json import parse_json
from ..data.tokenizer import END, PAD

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CARRIED = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
"""What an import takes along and an export gives back."""


def described(attachments: Mapping[str, bytes], context: int) -> dict[str, bytes]:
    """The attachments of a checkpoint, and for a tokenizer of ours what transformers wants to know of it."""
    found = {name: raw for name, raw in attachments.items() if name in CARRIED}
    if TOKENIZER in found and TOKENIZER_CONFIG not in found:
        tree = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
        }
        found[TOKENIZER_CONFIG] = (json.dumps(tree, indent=2) + "\n").encode()
    return found


def special_tokens(attachments: Mapping[str, bytes]) -> dict[str, int | None]:
    """`eos_token_id` and `pad_token_id` of a tokenizer of ours; none of any other. Raises `Malformed`."""
    if TOKENIZER not in attachments:
        return {}
    added = parse_json(attachments[TOKENIZER]).get("added_tokens")
    numbers = {} if added is None else {each["content"].text(): each["id"].whole() for each in added.list()}
    return {key: numbers[token] for key, token in (("eos_token_id", END), ("pad_token_id", PAD)) if token in numbers}
