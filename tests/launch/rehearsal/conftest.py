"""What the tests of a rehearsed rank share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.rehearsal.device.shim import build_shim


@pytest.fixture(scope="session")
def shim() -> Path:
    """The compiled library; a test that needs it is skipped where it cannot be built."""
    try:
        return build_shim()
    except ConfigError as refused:
        pytest.skip(str(refused))
