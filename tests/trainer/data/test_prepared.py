"""A prepared directory is verified before it is used."""

from pathlib import Path

from shoestring.tests.trainer.data.small_data import refusal, shard, verify_for_launch
from shoestring.trainer.data.inspect import describe_prepared_data
from shoestring.trainer.data.prepared import open_prepared_directory, verify_prepared_data


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
