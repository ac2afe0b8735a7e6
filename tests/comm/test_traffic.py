"""Bytes that a rank sends, by operation, kind and link."""

from datetime import timedelta

from shoestring.comm.groups import Group
from shoestring.comm.topology import LinkType, Topology
from shoestring.comm.traffic import TrafficCounter, TrafficKind


def test_bytes_are_added_by_operation_kind_and_link() -> None:
    traffic = TrafficCounter(Topology(ep=4, gpus_per_node=2), rank=0)
    group = Group((0, 1, 2, 3), None, 0, timedelta(seconds=1))
    for _ in range(2):
        traffic.count("dispatch", TrafficKind.PAYLOAD, group, [1, 2, 4, 8])
    traffic.count("combine", TrafficKind.METADATA, group, [16, 0, 0, 32])
    payload = {LinkType.LOOPBACK: 2, LinkType.NVLINK: 4, LinkType.INFINIBAND: 24}
    metadata = {LinkType.LOOPBACK: 16, LinkType.NVLINK: 0, LinkType.INFINIBAND: 32}
    assert traffic.bytes_by_link(TrafficKind.PAYLOAD) == traffic.bytes_by_link(operation="dispatch") == payload
    assert traffic.bytes_by_link(TrafficKind.METADATA) == traffic.bytes_by_link(operation="combine") == metadata
    assert traffic.bytes_by_link() == {link: payload[link] + metadata[link] for link in LinkType}
    traffic.reset()
    assert not any(traffic.bytes_by_link().values())
