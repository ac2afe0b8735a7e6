"""Construction of the token dispatcher that a configuration names."""

from collections.abc import Mapping
from typing import Any

from ..async_comm import AsyncCommunicator
from ..groups import ExpertGroups
from ..traffic import TrafficCounter
from .api import TokenExchange
from .buffer_bytes import ExchangeBufferBytes, ExchangeShape
from .config import ExchangeConfig
from .deepep import DeepEPExchange
from .deepep_buffer import DeepEPAllocatorBytes, DeepEPBufferShape
from .flat import FlatBufferBytes, FlatExchange
from .two_hop import TwoHopBufferBytes, TwoHopExchange


def build_token_exchange(
    config: ExchangeConfig,
    groups: ExpertGroups,
    num_experts: int,
    async_communicator: AsyncCommunicator,
    traffic: TrafficCounter,
    deepep_shape: DeepEPBufferShape | None = None,
) -> TokenExchange[Any]:
    """Return the token dispatcher for layers of `num_experts` experts. Collective over the expert-parallel group.

    Only `deepep` needs `deepep_shape`: it allocates its buffers here.
    """
    if config.name == "deepep":
        assert deepep_shape is not None
        return DeepEPExchange(groups, num_experts, async_communicator, config, deepep_shape)
    if config.name == "flat":
        return FlatExchange(groups, num_experts, async_communicator, traffic, config)
    return TwoHopExchange(groups, num_experts, async_communicator, traffic, config)


_BUFFER_BYTES: Mapping[str, type[ExchangeBufferBytes]] = {
    "flat": FlatBufferBytes,
    "two_hop": TwoHopBufferBytes,
    "deepep": DeepEPAllocatorBytes,
}


def exchange_buffer_bytes(shape: ExchangeShape) -> ExchangeBufferBytes:
    """Return the bytes of the operations of the configured exchange."""
    return _BUFFER_BYTES[shape.config.name](shape)
