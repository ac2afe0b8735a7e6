"""`shoestring data preview` shows the samples that a run sees first."""

import json
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.answers.page import html_page
from shoestring.launch.answers.terminal import terminal_text
from shoestring.launch.compose import compose_run_config
from shoestring.launch.data.preview import preview_answer
from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer_folder
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.tokenizer import load_tokenizer_file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("preview")
    texts = [f"Document {n} spells <｜fim▁begin｜> and goes on: " + "word " * 40 for n in range(60)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = compose_run_config(
        [
            f"data.corpus={root / 'a.jsonl'}",
            f"data.prepared={root / 'prepared'}",
            f"data.tokenizer={deepseek_tokenizer_folder()}",
            *("data.vocab_size=null", "model.vocab_size=null", "data.validation=[]", "data.validation_fraction=0.2"),
            *("data.fim_rate=0.5", "training.sequence_length=64"),
        ]
    )
    prepare_corpus(config.data, lambda line: None)
    return config


def test_control_tokens_are_marked_and_spelled_ones_are_text(config: RunConfig) -> None:
    answer = preview_answer(config, 20)
    spans = [span for block in answer.sections[0].blocks for span in block.spans]  # type: ignore[union-attr]
    marked = {span.text for span in spans if span.style == "control"}
    assert marked == {"<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"}
    assert any("spells <｜fim▁begin｜> and" in span.text for span in spans if not span.style)
    begins = load_tokenizer_file(deepseek_tokenizer_folder(), None).decoder.token_to_id("<｜fim▁begin｜>")
    data = answer.data
    assert isinstance(data, dict)
    counted = sum(sample["tokens"].count(begins) for sample in data["samples"])
    assert counted == sum(span.text == "<｜fim▁begin｜>" for span in spans if span.style)
    assert [len(sample["tokens"]) for sample in data["samples"]] == [65] * 20


def test_the_terminal_and_the_page_show_the_marks(config: RunConfig) -> None:
    answer = preview_answer(config, 3)
    assert "\x1b[1;7m<｜" in terminal_text(answer, width=200, colors=True)
    assert '<mark class="control">&lt;｜' in html_page(answer, "shoestring data preview")


def test_fewer_than_one_sample_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--samples = 0: must be at least 1"):
        preview_answer(config, 0)
