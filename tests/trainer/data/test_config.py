"""The configuration of the data: all bad values in one error."""

from dataclasses import replace

from shoestring.tests.trainer.data.small_corpus import refusal
from shoestring.trainer.data.config import DataConfig


def test_bad_values_are_listed_together(config: DataConfig) -> None:
    message = refusal(replace(config, vocab_size=10, validation=("held", "held"), fim_rate=1.5, workers=0))
    assert "data.vocab_size = 10: must be at least 258" in message
    assert "names a file twice" in message
    assert "data.fim_rate = 1.5: must be less than 1" in message
    assert "data.workers = 0: must be at least 1" in message


def test_validation_is_files_or_a_share(config: DataConfig) -> None:
    assert "name files, or set data.validation_fraction, not both" in refusal(replace(config, validation=()))
    assert "not both" in refusal(replace(config, validation_fraction=0.1))


def test_a_vocabulary_size_is_for_a_tokenizer_that_is_trained(config: DataConfig) -> None:
    assert "with data.tokenizer leave it out" in refusal(replace(config, tokenizer="tokenizer.json"))
    assert "is needed to train a tokenizer" in refusal(replace(config, vocab_size=None))


def test_fill_in_the_middle_names_three_tokens(config: DataConfig) -> None:
    assert "must name three tokens" in refusal(replace(config, fim_tokens=("a", "b")))
