"""A process that runs or compiles Triton kernels."""

import os
import subprocess
import sys
from pathlib import Path


def run(module: str, *arguments: str, tmp_path: Path, interpret: bool) -> str:
    # Fusion is set explicitly because its default changes; a user's kernel cache is not used.
    chosen = {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | chosen
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-m", f"shoestring.tests.trainer.precision.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
