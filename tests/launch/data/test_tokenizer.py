"""`shoestring data tokenizer` describes a tokenizer and encodes a text."""

from shoestring.launch.data.tokenizer import tokenizer_answer
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer, deepseek_tokenizer_folder
from shoestring.trainer.data.config import DataConfig


def test_the_answer_has_sizes_control_tokens_and_the_tokens_of_the_text() -> None:
    config = DataConfig(
        corpus="unused", prepared="unused", tokenizer=str(deepseek_tokenizer_folder()), validation_fraction=0.1
    )
    answer = tokenizer_answer(config, "To be, or not")
    assert isinstance(answer.data, dict)
    assert answer.data["vocab_size"] == answer.data["entries"] == 129_280
    assert answer.data["eos_token"] == "<｜end▁of▁sentence｜>"
    assert answer.data["tokens"] == deepseek_tokenizer().encode("To be, or not")
    check_renderings(answer, smallest_number_of_quantities=2)
