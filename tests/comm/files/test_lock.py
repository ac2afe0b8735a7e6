"""A file has one writer at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.comm.files.lock import lock_or_refuse


def test_a_second_writer_is_refused_until_the_first_has_closed_the_file(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        lock_or_refuse(first.fileno(), "run", "a", "is held")
        with pytest.raises(ConfigError, match="run = 'a': is held"):
            lock_or_refuse(second.fileno(), "run", "a", "is held")
        first.close()
        lock_or_refuse(second.fileno(), "run", "a", "is held")
