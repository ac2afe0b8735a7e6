"""Bytes that a rank sends, by operation, kind and link."""

from __future__ import annotations

from datetime import timedelta

from shoestring.comm.groups import Group
from shoestring.comm.topology import Link, Topology
from shoestring.comm.traffic import Traffic, TrafficKind


def test_bytes_are_added_by_operation_kind_and_link() -> None:
    traffic = Traffic(Topology(ep=4, gpus_per_node=2), rank=0)
    group = Group((0, 1, 2, 3), None, 0, timedelta(seconds=1))
    for _ in range(2):
        traffic.count("dispatch", group, [1, 2, 4, 8])
    traffic.count_beside("combine", group, [16, 0, 0, 32])
    payload = {Link.LOOPBACK: 2, Link.NVLINK: 4, Link.INFINIBAND: 24}
    beside = {Link.LOOPBACK: 16, Link.NVLINK: 0, Link.INFINIBAND: 32}
    assert traffic.by_link(TrafficKind.PAYLOAD) == traffic.by_link(operation="dispatch") == payload
    assert traffic.by_link(TrafficKind.BESIDE) == traffic.by_link(operation="combine") == beside
    assert traffic.by_link() == {link: payload[link] + beside[link] for link in Link}
    traffic.clear()
    assert not any(traffic.by_link().values())
