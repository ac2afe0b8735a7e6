"""Whether DeepEP imports here: tried in a child process, because its import loads libraries and may end the process.

What it asserts (deep_ep/__init__.py of 2.1.0): one libnccl is mapped, and it is byte for byte the one that DeepEP was
built with. It compiles kernels with nvcc when they are first used, so that has to be here too. Not yet run on hardware.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

IMPORT_TIMEOUT_SECONDS = 120.0
"""Torch and DeepEP from a file system that a whole cluster reads at once."""

# torch first, as in a rank: its libnccl is then the one that is mapped.
_PROGRAM = """
import os, torch, deep_ep
deep_ep.ElasticBuffer
nvcc = os.environ.get("EP_JIT_NVCC_COMPILER") or os.path.join(deep_ep.find_cuda_home(), "bin", "nvcc")
if not os.path.exists(nvcc):
    raise SystemExit(f"it compiles its kernels at run time, and {nvcc} is not there")
"""


def probe_deepep_import(
    environment: Mapping[str, str] | None = None, timeout_seconds: float = IMPORT_TIMEOUT_SECONDS
) -> str | None:
    """Return the last line that importing DeepEP prints as it fails; None where it succeeds.

    `environment` is that of a rank; None: as this process. A child that takes longer than `seconds` is killed. The
    answer is kept for the life of this process.
    """
    described = dict(os.environ if environment is None else environment)
    return _outcome(tuple(sorted(described.items())), timeout_seconds)


@cache
def _outcome(environment: tuple[tuple[str, str], ...], seconds: float) -> str | None:
    command = [sys.executable, "-c", _PROGRAM]
    try:
        child = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it has not ended after {seconds:g} s"
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process that imports it ended with code {child.returncode}"
