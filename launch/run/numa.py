"""Binding the ranks of GPUs to the CPUs beside them, by torchrun's --numa-binding. Not yet run on hardware."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
BINDING = "--numa-binding=node"


@dataclass(frozen=True)
class NumaFacts:
    """What decides whether ranks can be bound here."""

    cpus: tuple[frozenset[int], ...]
    """Of each NUMA node with CPUs."""
    allowed: frozenset[int]
    """CPUs that this process may use."""
    has_numactl: bool
    """torchrun runs it."""
    has_flag: bool
    """Whether this torchrun knows the flag."""

    @staticmethod
    def here(nodes: Path = _NODES) -> NumaFacts:
        """Those of this machine."""
        lists = (path.read_text() for path in sorted(nodes.glob("node[0-9]*/cpulist")))
        cpus = tuple(found for found in map(read_cpus, lists) if found)
        has_flag = importlib.util.find_spec("torch.numa.binding") is not None
        return NumaFacts(cpus, frozenset(os.sched_getaffinity(0)), shutil.which("numactl") is not None, has_flag)


def read_cpus(text: str) -> frozenset[int]:
    """The CPUs of a list as Linux writes it: 0-3,8."""
    spans = (part.partition("-")[::2] for part in text.strip().split(",") if part)
    return frozenset(cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1))


def why_not_bound(facts: NumaFacts, *, on_gpu: bool) -> str | None:
    """Return why ranks are not bound to the CPUs of their GPU's NUMA node; None where they are.

    torchrun ends with an error where it cannot bind, so everything that it needs is looked at before.
    """
    if not on_gpu:
        return "ranks on CPUs use all of them"
    if len(facts.cpus) < 2:
        return "this machine has one NUMA node"
    if not facts.has_flag:
        return "this torch's torchrun has no --numa-binding"
    if not facts.has_numactl:
        return "numactl is not installed; install it (apt-get install numactl), so that Python runs beside its GPU"
    if not all(node & facts.allowed for node in facts.cpus):
        return "this process may not use CPUs of every NUMA node"
    return None
