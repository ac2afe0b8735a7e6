"""DeepSeek-V3's own figures for its run, to stand beside a forecast. None of them is an input of one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .forecast import Layout

STEP_SECONDS = 19.926
"""Insights paper (arXiv 2505.09343), table 4, MPFT."""
PHASES: Mapping[str, float] = MappingProxyType(
    {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "opt": 0.29}
)
"""Of that table, in seconds a step."""
PAIR_SECONDS = 0.129012
"""A forward and a backward of four routed layers (deepseek-ai/profile-data train.json)."""
PAIR_ROWS = ((31_104, 30_976, 36_864, 31_104), (34_688, 32_512, 32_896, 28_416))
"""Rows that reached the traced rank's experts in the four layers of the forward and of the backward."""
GLOBAL_BATCH, LENGTH, GPUS = 15_360, 4096, 2048


def is_published(model: str, cluster: str, layout: Layout, global_batch: int, length: int) -> bool:
    """Whether this is the layout that the figures above are of."""
    topology = layout.topology
    same = (topology.pp, topology.ep, topology.world_size) == (16, 64, GPUS) and layout.micro_batch == 1
    names = (model, cluster, layout.schedule) == ("deepseek_v3", "h800", "dualpipe")
    return same and names and (global_batch, length) == (GLOBAL_BATCH, LENGTH)
