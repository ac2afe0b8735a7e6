"""The tokenizer of a run: prepared with, trained with, saved, generated with, exported, imported and started from."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import shoestring
from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.small_checkpoint import SHAPE, TEXT, model
from shoestring.tests.processes import run_processes
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer, deepseek_tokenizer_folder
from shoestring.tests.trainer.small_loop import run_config, run_rank
from shoestring.trainer.checkpoint.checkpoint import Checkpoint
from shoestring.trainer.checkpoint.find import find_checkpoint
from shoestring.trainer.checkpoint.tokenizer import checkpoint_eos_token_id, find_tokenizer
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.prepared import open_prepared_data
from shoestring.trainer.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, train_tokenizer
from shoestring.trainer.huggingface.export import ExportOptions, export_checkpoint
from shoestring.trainer.huggingface.import_weights import import_huggingface_weights
from shoestring.trainer.structured_config import build_dataclass

END = "<｜end｜>"


def silent(line: str) -> None:
    pass


def write_corpus(root: Path) -> None:
    (root / "corpus" / "web").mkdir(parents=True)
    lines = [json.dumps({"content": f"Document {number}: <｜fim▁begin｜> {TEXT[:150]}"}) for number in range(60)]
    (root / "corpus" / "web" / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (root / "corpus" / "held.txt").write_text(TEXT[:400])


def tree_of(root: Path, rows: int, data: Mapping[str, Any], **training: Any) -> dict[str, Any]:
    tree = run_config(root)
    tree["model"] |= {"vocab_size": rows}
    tree["data"] |= {"vocab_size": None, "text_key": "content", **data}
    tree["training"] |= training
    return tree


def prepare(tree: dict[str, Any]) -> RunConfig:
    config = build_dataclass(RunConfig, tree)
    assert not list(config.problems())
    prepare_corpus(config.data, silent, tokenizer=find_tokenizer(config))
    return config


def export(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Export the checkpoint to `folder`; return its config.json."""
    export_checkpoint(checkpoint, folder, ExportOptions(dtype="fp32"), silent)
    tree: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return tree


def test_deepseeks_tokenizer_from_the_text_to_the_export(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    folder, tokenizer = deepseek_tokenizer_folder(), deepseek_tokenizer()
    tree = tree_of(tmp_path, 129280, {"tokenizer": str(folder), "fim_rate": 0.5}, tokens=256)
    data = open_prepared_data(prepare(tree).data)
    tokens = data.train.read_tokens(0, data.train.num_tokens)
    control = tokens[np.isin(tokens, list(tokenizer.control_tokens))]
    begun, ends = int((control == 128801).sum()), int((control == 1).sum())
    assert set(control) == {1, 128800, 128801, 128802}  # none comes from the text, which spells one
    assert ends == 60
    assert 10 <= begun <= 50
    run_processes(1, run_rank, tree)

    checkpoint = find_checkpoint(tmp_path / "run")
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        assert checkpoint.read_attachment(name) == (folder / name).read_bytes()
    loaded = shoestring.load(checkpoint.path)
    assert (loaded.stop_token_id, checkpoint.run_eos_token_id) == (1, 1)
    assert loaded.decode([*loaded.encode("天 to"), 1]) == "天 to<｜end▁of▁sentence｜>"
    assert export(checkpoint, tmp_path / "hf")["eos_token_id"] == 1
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token_id, theirs.encode(TEXT, add_special_tokens=False)) == (1, tokenizer.encode(TEXT))
    again = build_dataclass(RunConfig, tree_of(tmp_path, 129280, {}, start_from=str(tmp_path / "run")))
    taken = find_tokenizer(again)
    assert taken is not None
    assert (taken.raw, taken.config, taken.eos_token_id) == (tokenizer.raw, tokenizer.config, 1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a tokenizer of 304 entries whose control tokens are not special, without a configuration beside it."""
    tree = json.loads(train_tokenizer([TEXT], 300).raw)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    names = [END, "<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    tree["added_tokens"] = [{"id": 300 + number, "content": name, **flags} for number, name in enumerate(names)]
    for token in ("<|end|>", "<|pad|>"):  # of Shoestring's own
        tree["model"]["vocab"][f"unused{token}"] = tree["model"]["vocab"].pop(token)
    path = tmp_path / "small.json"
    path.write_text(json.dumps(tree))
    return path


def test_a_tokenizer_with_fewer_entries_than_rows(small: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    tree = tree_of(tmp_path, 320, {"tokenizer": str(small), "eos_token": END, "fim_rate": 0.5})
    data = open_prepared_data(prepare(tree).data)
    assert (data.manifest.settings.vocab_size, data.manifest.settings.fim_token_ids) == (304, (301, 302, 303))
    assert data.train.read_tokens(0, data.train.num_tokens).max() == 303
    trained = build_dataclass(RunConfig, tree_of(tmp_path, 320, {"vocab_size": 300})).data
    with pytest.raises(ConfigError, match=r"was prepared with other settings: tokenizer_sha256"):
        prepare_corpus(trained, silent)
    run_processes(1, run_rank, tree)

    checkpoint = find_checkpoint(tmp_path / "run")
    assert shoestring.load(checkpoint.path).stop_token_id == 300
    config = export(checkpoint, tmp_path / "hf")
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (320, 300, None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token, theirs.eos_token_id, theirs.pad_token, len(theirs)) == (END, 300, None, 304)

    import_huggingface_weights(tmp_path / "hf", tmp_path / "imported", silent)
    started = tree_of(tmp_path, 320, {"prepared": str(tmp_path / "again")}, start_from=str(tmp_path / "imported"))
    settings = open_prepared_data(prepare(started).data).manifest.settings
    assert (settings.tokenizer_sha256, settings.eos_token_id) == (data.manifest.settings.tokenizer_sha256, 300)
    started["training"]["run_dir"] = str(tmp_path / "second")
    started["precision"] = {"compute": "float32"}  # the weights of an import
    run_processes(1, run_rank, started)
    assert shoestring.load(tmp_path / "second").stop_token_id == 300


def test_more_entries_than_rows_are_refused(small: Path, tmp_path: Path) -> None:
    config = build_dataclass(RunConfig, tree_of(tmp_path, 303, {"tokenizer": str(small), "eos_token": END}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*has 304 token ids, more than model\.vocab_size = 303"):
        find_tokenizer(config)
    save_model(model(1), tmp_path / "saved", 0, {TOKENIZER_FILE: small.read_bytes()})
    tree = tree_of(tmp_path, 300, {"eos_token": END}, start_from=str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=r"training\.start_from = .*has 304 token ids"):
        find_tokenizer(build_dataclass(RunConfig, tree))


def test_a_checkpoint_without_a_tokenizer_or_an_end_token(small: Path, tmp_path: Path) -> None:
    save_model(model(1), tmp_path / "bare")
    save_model(model(1), tmp_path / "nameless", 0, {TOKENIZER_FILE: small.read_bytes()})
    found = {name: build(tmp_path, name) for name in ("bare", "nameless")}
    assert find_tokenizer(found["bare"]) is None
    with pytest.raises(ConfigError, match=r"data\.eos_token = None: is needed: the tokenizer of .*nameless"):
        find_tokenizer(found["nameless"])
    named = replace(found["nameless"], data=replace(found["nameless"].data, eos_token=301))
    tokenizer = find_tokenizer(named)
    assert tokenizer is not None
    assert tokenizer.eos_token_id == 301
    assert find_tokenizer(replace(named, training=replace(named.training, start_from=None))) is None  # to be trained


def build(root: Path, start_from: str) -> RunConfig:
    return build_dataclass(RunConfig, tree_of(root, 320, {}, start_from=str(root / start_from)))


def test_the_end_token_of_an_import(small: Path, tmp_path: Path) -> None:
    """`config.json` may name none, one, or several; then the tokenizer's configuration tells which ends a document."""
    own = {TOKENIZER_FILE: small.read_bytes()}
    beside = own | {TOKENIZER_CONFIG_FILE: json.dumps({"eos_token": {"content": "<fim_middle>"}}).encode()}
    shoestrings = {TOKENIZER_FILE: train_tokenizer([TEXT], SHAPE.vocab_size).raw}
    cases: list[tuple[dict[str, bytes], object, int | None]] = [
        (own, 7, 7),
        (own, None, None),
        (own, -1, None),
        (own, [7, 8], None),
        (beside, [7, 8], 303),
        (beside, 7, 7),
        (shoestrings, None, 0),
        ({}, 7, 7),
        ({}, None, None),
    ]
    for number, (attachments, said, expected) in enumerate(cases):
        checkpoint = save_model(model(1), tmp_path / str(number), 0, attachments)
        facts = {**checkpoint.manifest.metadata, "source": {"eos_token_id": said}}
        imported = replace(checkpoint, manifest=replace(checkpoint.manifest, metadata=facts))
        assert checkpoint_eos_token_id(imported) == expected, number


def test_an_end_token_of_the_run_replaces_that_of_the_tokenizers_configuration(small: Path, tmp_path: Path) -> None:
    config = json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}).encode()
    files = {TOKENIZER_FILE: small.read_bytes(), TOKENIZER_CONFIG_FILE: config}
    checkpoint = save_model(model(1), tmp_path / "saved", 0, files)
    assert export(checkpoint, tmp_path / "same")["eos_token_id"] is None
    assert (tmp_path / "same" / TOKENIZER_CONFIG_FILE).read_bytes() == config
    facts = {**checkpoint.manifest.metadata, "eos_token_id": 302}
    ours = replace(checkpoint, manifest=replace(checkpoint.manifest, metadata=facts))
    assert export(ours, tmp_path / "other")["eos_token_id"] == 302
    assert AutoTokenizer.from_pretrained(tmp_path / "other").eos_token == "<fim_suffix>"
