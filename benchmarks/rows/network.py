"""Rows that need several ranks: all-reduce and uneven all-to-all over all ranks, inside a node, and between nodes.

Letters: P ranks of a group.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
import torch.distributed as dist

from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, Wrong
from shoestring.comm.groups import Group

Pick = Callable[[Machine], Group]
Rows = Callable[[int, int], int]
"""Function that returns the rows that one rank sends to another."""


def all_reduce(pick: Pick, machine: Machine) -> Figures:
    """Test an all-reduce. Bandwidth is nccl-tests' busbw: 2 (P - 1) / P of the buffer per link and direction."""
    group = _several(pick(machine))
    values = 2**26 if machine.on_gpu else 2**18
    buffer = torch.full((values,), float(group.ranks.index(group.rank) + 1), device=machine.device)
    dist.all_reduce(buffer, group=group.process_group)
    total = group.size * (group.size + 1) / 2
    if not bool((buffer == total).all()):
        raise Wrong(f"the sum holds {buffer.min().item()} to {buffer.max().item()}, not {total}")
    buffer.zero_()
    seconds = machine.seconds(lambda: dist.all_reduce(buffer, group=group.process_group))
    moved = 2 * (group.size - 1) / group.size * buffer.numel() * buffer.element_size()
    return {"GB/s": moved / seconds / 1e9, "MiB": buffer.numel() * 4 / 2**20, "ms": seconds * 1e3}


def all_to_all(pick: Pick, machine: Machine) -> Figures:
    """Test an all-to-all with uneven sizes and zeros, then with one rank that neither sends nor receives.

    Bandwidth is what the busiest rank sends to others, or receives from them, over the time.
    """
    group = _several(pick(machine))
    unit, width = (1024, 7168) if machine.on_gpu else (64, 256)

    def uneven(source: int, target: int) -> int:
        return unit * ((source + 2 * target) % 3)

    def first_is_silent(source: int, target: int) -> int:
        return unit if source and target else 0

    _exchange(machine, group, width, first_is_silent)
    again = _exchange(machine, group, width, uneven)
    seconds = machine.seconds(again)
    moved = _busiest(uneven, group.size) * width * 2
    return {"GB/s": moved / seconds / 1e9, "MiB": moved / 2**20, "ms": seconds * 1e3}


def _exchange(machine: Machine, group: Group, width: int, rows: Rows) -> Callable[[], object]:
    """Check one all-to-all, and return a function that repeats it. Rank s sends the number P·s + t to rank t."""
    me, size = group.ranks.index(group.rank), group.size
    sent_P = [rows(me, target) for target in range(size)]
    received_P = [rows(source, me) for source in range(size)]
    marks = [torch.full((count, width), float(size * me + target)) for target, count in enumerate(sent_P)]
    send = torch.cat(marks).to(machine.device, torch.bfloat16)
    receive = send.new_full((sum(received_P), width), -1)

    def run() -> None:
        dist.all_to_all_single(receive, send, received_P, sent_P, group=group.process_group)

    run()
    wanted = [torch.full((count, width), float(size * source + me)) for source, count in enumerate(received_P)]
    if not torch.equal(receive.cpu(), torch.cat(wanted).bfloat16()):
        raise Wrong(f"rank {group.rank} received rows that were not sent to it")
    return run


def _busiest(rows: Rows, size: int) -> int:
    """Return the rows that the busiest rank sends to others or receives from them."""
    everyone = range(size)
    sent = [sum(rows(s, t) for t in everyone if t != s) for s in everyone]
    received = [sum(rows(s, t) for s in everyone if s != t) for t in everyone]
    return max(*sent, *received)


def _several(group: Group) -> Group:
    if group.size == 1:
        raise NotHere("there are no two such ranks")
    return group


_GROUPS: tuple[tuple[str, Pick], ...] = (
    ("all ranks", attrgetter("world")),
    ("inside the node", attrgetter("node")),
    ("between nodes", attrgetter("rail")),
)
CHECKS = tuple(
    Check(f"{name}, {where}", partial(run, pick), mandatory=True)
    for name, run in (("all_reduce", all_reduce), ("all_to_all", all_to_all))
    for where, pick in _GROUPS
)
