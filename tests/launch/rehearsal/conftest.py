"""Fixtures of the tests of a rehearsed rank."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.rehearsal.device.shim import build_autograd_shim
from shoestring.launch.rehearsal.log import RankLog
from shoestring.tests.launch.rehearsal.rehearsed_rank import BF16, BF16_RANK, FP8, FP8_RANK, MICRO_BATCHES, rehearse


@pytest.fixture(scope="session")
def shim() -> Path:
    """Compile the library; skip the test where it cannot be built."""
    try:
        return build_autograd_shim()
    except ConfigError as refused:
        pytest.skip(str(refused))


@pytest.fixture(scope="session")
def in_fp8(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> RankLog:
    pytest.importorskip("triton")
    return rehearse(shim, tmp_path_factory.mktemp("fp8"), FP8, FP8_RANK, micro_batches=MICRO_BATCHES)


@pytest.fixture(scope="session")
def in_bf16(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> RankLog:
    return rehearse(shim, tmp_path_factory.mktemp("bf16"), BF16, BF16_RANK)


@pytest.fixture(params=["in_fp8", "in_bf16"])
def log(request: pytest.FixtureRequest) -> RankLog:
    found: RankLog = request.getfixturevalue(request.param)
    return found
