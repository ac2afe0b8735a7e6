"""Runs `device_cases.py` in a process that loads the shim before torch."""

import subprocess
import sys
from pathlib import Path

_LOADED = "import ctypes, sys; ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)"
_RUN = f"{_LOADED}; import pytest; sys.exit(pytest.main(sys.argv[2:]))"


def test_cases(shim: Path) -> None:
    cases = str(Path(__file__).with_name("device_cases.py"))
    command = [sys.executable, "-c", _RUN, str(shim), "-q", "-p", "no:cacheprovider", cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout or "[100%]" in done.stdout
