"""`shoestring data tokenizer`: what a tokenizer holds, and the tokens of a text."""

from pathlib import Path

from ...trainer.data.config import DataConfig
from ...trainer.data.prepared import open_prepared_directory
from ...trainer.data.tokenizer import Tokenizer, load_tokenizer_file
from ..answers.blocks import Answer, Block, Cell, MarkedText, TextSpan, number, table


def tokenizer_answer(config: DataConfig, text: str) -> Answer:
    """Describe `data.tokenizer`, or without one that of the prepared data. Raises `ConfigError`."""
    if config.tokenizer is not None:
        place, tokenizer = config.tokenizer, load_tokenizer_file(Path(config.tokenizer), config.eos_token)
    else:
        place, tokenizer = config.prepared, open_prepared_directory(Path(config.prepared)).tokenizer
    end, tokens = tokenizer.eos_token_id, tokenizer.encode(text)
    end_name = tokenizer.decode([end])
    data = {
        "tokenizer": place,
        "vocab_size": tokenizer.vocab_size,
        "entries": tokenizer.entries,
        "eos_token_id": end,
        "eos_token": end_name,
        "control_tokens": tokenizer.control_tokens,
        "tokens": tokens,
    }
    controls = list(tokenizer.control_tokens.values())
    more = " …" * (len(controls) > _MOST_NAMES)
    rows: list[tuple[Cell, Cell]] = [
        ("token ids", number(tokenizer.vocab_size)),
        ("entries", number(tokenizer.entries)),
        ("end of a document", f"{end_name} ({end})"),
        (
            "control tokens",
            f"{len(controls)}: {', '.join(controls[:_MOST_NAMES])}{more}",
        ),
    ]
    blocks: list[Block] = [table("", ("", place), rows)]
    if text:
        blocks.append(MarkedText(f"{len(tokens)} tokens", _pieces(tokenizer, tokens)))
    return Answer.from_blocks(f"Tokenizer of {place}", data, blocks)


_MOST_NAMES = 12


def _pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[TextSpan]:
    """Return the text of each token, every second one marked, so that their bounds are seen."""
    return [TextSpan(tokenizer.decode([token]), "control" if place % 2 else "") for place, token in enumerate(tokens)]
