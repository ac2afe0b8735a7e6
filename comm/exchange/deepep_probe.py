"""Probe of DeepEP's import in a child process, because the import loads libraries and may end the process.

The import asserts (deep_ep/__init__.py of 2.1.0) that exactly one libnccl is mapped, and that it is byte for byte the
one that DeepEP was built with. Not yet run on hardware.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

IMPORT_TIMEOUT_SECONDS = 120.0
"""Longest time of the import: torch and DeepEP from a file system that a whole cluster reads at the same time."""

# torch first, as in a rank: its libnccl is then the one that is mapped. DeepEP compiles kernels at their first use, so
# a missing nvcc would else stop the first step.
_PROGRAM = """
import os, torch, deep_ep
deep_ep.ElasticBuffer
nvcc = os.environ.get("EP_JIT_NVCC_COMPILER") or os.path.join(deep_ep.find_cuda_home(), "bin", "nvcc")
if not os.path.exists(nvcc):
    raise SystemExit(f"it compiles its kernels at run time, and {nvcc} does not exist")
"""


def probe_deepep_import(
    environment: Mapping[str, str] | None = None, timeout_seconds: float = IMPORT_TIMEOUT_SECONDS
) -> str | None:
    """Return the last line of error of a failed import of DeepEP; None if it succeeds.

    `environment` is that of a rank; None is that of this process. A child that takes longer than `timeout_seconds` is
    killed. The answer is cached.
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
        return f"it did not finish within {seconds:g} s"
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process that imports it ended with code {child.returncode}"
