"""A prepared directory is verified before it is used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from shoestring.tests.launch.refusals import by_field
from shoestring.tests.trainer.data.small_data import refusal, shard, verify_for_launch
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.inspect import describe_prepared_data
from shoestring.trainer.data.prepared import open_prepared_directory, tokenizer_problems, verify_prepared_data
from shoestring.trainer.data.tokenizer import END_TOKEN, PAD_TOKEN


def test_what_was_written_verifies(directory: Path) -> None:
    assert verify_prepared_data(directory).manifest == open_prepared_directory(directory).manifest


def test_a_changed_byte_is_found_by_verify(directory: Path) -> None:
    path = shard(directory, "train")
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    open_prepared_directory(directory)  # reads no token
    for act in (verify_prepared_data, describe_prepared_data, verify_for_launch):
        message = refusal(act, directory)
        assert message.count(path.name) == 1
        assert "the file is damaged; remove the directory and prepare again" in message


def test_another_tokenizer_in_the_configuration_is_refused(directory: Path, tmp_path: Path) -> None:
    prepared = open_prepared_directory(directory)
    config = DataConfig(corpus="x", prepared=str(directory), validation=("b",), tokenizer=str(directory))

    def found(**changes: Any) -> dict[str, str]:
        return by_field(tokenizer_problems(replace(config, **changes), prepared))

    assert found() == found(tokenizer=None, vocab_size=290) == found(eos_token=END_TOKEN) == found(eos_token=0) == {}
    assert "the documents of the data end with '<|end|>'" in found(eos_token=PAD_TOKEN)["data.eos_token"]
    assert list(found(eos_token="<none>")) == list(found(eos_token=1)) == ["data.eos_token"]
    assert "does not exist" in found(tokenizer=str(tmp_path / "none"))["data.tokenizer"]
    (tmp_path / "tokenizer.json").write_text(prepared.tokenizer.raw.decode() + "\n")
    assert "is not the tokenizer that the data was prepared with" in found(tokenizer=str(tmp_path))["data.tokenizer"]
    settings = replace(prepared.manifest.settings, fim_rate=0.1, fim_token_ids=(0, 1, 2))
    prepared = replace(prepared, manifest=replace(prepared.manifest, settings=settings))
    names = tuple(prepared.tokenizer.decode([number]) for number in (0, 1, 2))
    assert found(fim_rate=0.1) == found(fim_rate=0.1, fim_tokens=names) == {}
    assert f"the data has {list(names)}" in found(fim_rate=0.1, fim_tokens=names[::-1])["data.fim_tokens"]
