"""The library for torch without CUDA: its compiler, and the torch version that it needs."""

from pathlib import Path

import pytest
import torch

from shoestring.comm.errors import ConfigError
from shoestring.launch.rehearsal.device.shim import build_autograd_shim


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"install g\+\+"):
        build_autograd_shim()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ConfigError, match="could not compile"):
        build_autograd_shim()
    assert not list(tmp_path.rglob("*.so"))


def test_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(ConfigError, match=r"torch = '2\.12\.1\+cpu'"):
        build_autograd_shim()
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match="was built for GPUs"):
        build_autograd_shim()
