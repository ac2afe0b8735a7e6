"""A prepared directory is verified before it is used."""

from pathlib import Path

from shoestring.tests.trainer.data.small_data import refusal, verify_for_launch
from shoestring.trainer.data.inspect import describe_prepared_data
from shoestring.trainer.data.prepared import open_prepared_directory, verify_prepared_data


def test_what_was_written_verifies(directory: Path) -> None:
    assert verify_prepared_data(directory).manifest == open_prepared_directory(directory).manifest


def test_a_changed_byte_is_found_by_verify(directory: Path) -> None:
    shard = directory / "train_00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    open_prepared_directory(directory)  # reads no token
    for act in (verify_prepared_data, describe_prepared_data, verify_for_launch):
        message = refusal(act, directory)
        assert message.count("train_00000.bin") == 1
        assert "the file is damaged; remove the directory and prepare again" in message
