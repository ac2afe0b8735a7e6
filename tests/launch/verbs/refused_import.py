"""Imports that are refused and leave nothing behind, and edits of their input."""

import json
from pathlib import Path

import pytest

from shoestring.tests.launch.command_line import shoestring


def refused_import(capsys: pytest.CaptureFixture[str], hf: Path) -> str:
    """Return the output of a refused import that leaves nothing behind, not even the folder above the target."""
    target = hf.parent / "made" / "for" / "it"
    code, _, errors = shoestring(capsys, "import", hf, target)
    assert code == 2, errors
    assert "Traceback" not in errors
    assert not (hf.parent / "made").exists()
    return errors


def edit_config(hf: Path, **values: object) -> None:
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
