"""The API pages are built from the docstrings without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.docs.build_api import build_api
from shoestring.tests.tree import ROOT


def test_a_warning_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "misspelled.py").write_text('def f(x: "Tensro") -> None:\n    """Return nothing."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserWarning, match="Error parsing type annotation Tensro"):
        build_api(["misspelled"], tmp_path / "api")


@pytest.mark.slow
def test_every_module_has_a_page(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "build_api.py"), str(tmp_path)]  # it leaves mocks in its process
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "Warning" not in built.stderr
    assert "normalize" in (tmp_path / "shoestring" / "trainer" / "model" / "norm.html").read_text()
    for module in ("comm.exchange.two_hop", "trainer.precision.te_backend", "launch.cli"):
        assert (tmp_path / "shoestring" / module.replace(".", "/")).with_suffix(".html").is_file()
