"""The configuration of the data: all bad values in one error."""

from dataclasses import replace

from shoestring.tests.trainer.data.small_corpus import refusal
from shoestring.trainer.data.config import DataConfig


def test_bad_values_are_listed_together(config: DataConfig) -> None:
    message = refusal(replace(config, vocab_size=10, validation=("held", "held"), max_bad_records=-1, workers=0))
    assert "data.vocab_size = 10: must be at least 258" in message
    assert "names a file twice" in message
    assert "data.max_bad_records = -1: must be at least 0" in message
    assert "data.workers = 0: must be at least 1" in message


def test_a_preparation_needs_a_tokenizer_or_its_size(config: DataConfig) -> None:
    assert "is needed to train a tokenizer" in refusal(replace(config, vocab_size=None))
