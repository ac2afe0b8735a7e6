"""The two ways between host and device. In a step nothing else makes the host wait for a GPU.

On a CPU both return what they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(x: Tensor) -> Tensor:
    """`x` where Python can look at it. The host waits for the device: a step has few of these, and they are counted."""
    return x.cpu()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, which is on the host, on `device`. From pinned memory, so that the host does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
