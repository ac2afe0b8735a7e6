"""Fill-in-the-middle and split tokens: nothing is lost, and the shares are those asked for."""

from pathlib import Path

import numpy as np
import pytest

from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer
from shoestring.trainer.data.document_random import document_key, uniform_fraction, uniform_fractions
from shoestring.trainer.data.preparation.augmentation import (
    TokenSplitter,
    cut_for_fill_in_the_middle,
    join_fill_in_the_middle,
)

TEXT = "def f(x):\n    return (x);\n\n\nprint('a.');\n" * 50


def test_the_pieces_of_a_cut_text_are_the_text() -> None:
    lengths = []
    for key in range(500):
        prefix, middle, suffix = cut_for_fill_in_the_middle(TEXT, key)
        assert prefix + middle + suffix == TEXT
        lengths.append(len(middle))
    # Two uniform places are a third of the length apart on average.
    assert np.mean(lengths) == pytest.approx(len(TEXT) / 3, rel=0.1)
    assert cut_for_fill_in_the_middle("", 7) == ("", "", "")


def test_the_order_is_prefix_suffix_middle() -> None:
    assert join_fill_in_the_middle([[1], [2, 3], [4]], (10, 20, 30)) == [10, 1, 20, 4, 30, 2, 3]


def test_numbers_of_a_document_are_uniform_and_its_own() -> None:
    found = np.array([uniform_fraction(document_key(0, "order", "a.jsonl", place)) for place in range(4000)])
    assert abs(found.mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    assert len(np.unique(found)) == 4000
    assert document_key(0, "order", "a", 1) != document_key(0, "fim", "a", 1)
    many = uniform_fractions(document_key(1, "split", "a", 0), 10_000)
    assert ((many >= 0) & (many < 1)).all()
    assert abs(many.mean() - 0.5) < 4 * (1 / 12 / 10_000) ** 0.5


def test_joined_tokens_are_split_at_the_line_break(tmp_path: Path) -> None:
    tokenizer = deepseek_tokenizer()
    tokens_T = np.array(tokenizer.encode(TEXT), dtype=np.uint32)

    def splitter(rate: float) -> TokenSplitter:
        return TokenSplitter.from_tokenizer(
            rate, tokenizer.vocab_size, lambda token: tokenizer.decode([token]), tokenizer.encode
        )

    every = splitter(1.0)
    assert len(every.pieces) > 100
    joined = int((every.heads_V[tokens_T] >= 0).sum())
    assert joined >= 100  # `):\n` and `);\n`
    split_T = every.split(tokens_T, 5)
    assert tokenizer.decode(split_T.tolist()) == TEXT
    assert (every.heads_V[split_T] < 0).all()
    some_T = splitter(0.3).split(tokens_T, 5)
    assert tokenizer.decode(some_T.tolist()) == TEXT
    left = int((every.heads_V[some_T] >= 0).sum())
    assert abs((joined - left) - 0.3 * joined) < 4 * (0.21 * joined) ** 0.5
    assert splitter(0.0).split(tokens_T, 5) is tokens_T
