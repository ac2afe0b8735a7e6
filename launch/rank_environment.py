"""The variables that ranks start with, where the user has not set them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

_KEPT = str(2**33)  # bytes

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # With a pool each, ranks of one CPU spend their time spinning.
        "OMP_NUM_THREADS": "1",
        # glibc would give the memory of large tensors back to the kernel when they end, and fault it in again page by
        # page for the next. Read at the start of a process only.
        "MALLOC_TRIM_THRESHOLD_": _KEPT,
        "MALLOC_MMAP_THRESHOLD_": _KEPT,
    }
)


def rank_environment(own: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The environment of this process with the defaults, and with `own`, which wins."""
    return {**DEFAULTS, **os.environ, **own}
