"""A file has one writer at a time."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.comm.files.lock import acquire_exclusive_lock


def test_a_second_writer_is_refused_until_the_first_has_closed_the_file(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        acquire_exclusive_lock(first.fileno(), "run", "a", "is held")
        with pytest.raises(ConfigError, match="run = 'a': is held"):
            acquire_exclusive_lock(second.fileno(), "run", "a", "is held")
        first.close()
        acquire_exclusive_lock(second.fileno(), "run", "a", "is held")
