"""Setup for every test: this tree importable as `shoestring`, fixed seeds, and a skip reason where a GPU is missing."""

import importlib.util
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Stop with a hint when `import shoestring` would not load this tree."""
    spec = importlib.util.find_spec("shoestring")
    found = Path(spec.origin).resolve().parent if spec is not None and spec.origin is not None else None
    if found != ROOT:
        where = "cannot be imported" if found is None else f"is {found}, not this tree"
        raise pytest.UsageError(f"`shoestring` {where}. Run ./launch/test.sh, or: pip install -e '.[dev]' in {ROOT}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where torch sees none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch sees none")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """Restore signal handlers: a stopped launcher ignores further signals, and children would inherit that."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        signal.signal(number, handler)
