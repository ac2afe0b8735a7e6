"""A directory with prepared data for small training runs."""

from pathlib import Path

import pytest

from shoestring.tests.trainer.small_loop import prepared_root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("loop"), words=2000)
