"""The configuration of the data: all bad values in one error."""

from dataclasses import replace

from shoestring.tests.trainer.data.small_corpus import refusal
from shoestring.trainer.data.config import DataConfig


def test_bad_values_are_listed_together(config: DataConfig) -> None:
    message = refusal(replace(config, vocab_size=10, validation=("held", "held")))
    assert "data.vocab_size = 10: must be at least 258" in message
    assert "names a file twice" in message
    assert "at least one file" in refusal(replace(config, validation=()))
