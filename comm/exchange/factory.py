"""Construction of the token dispatcher that a configuration names."""

from __future__ import annotations

from typing import Any

from ..async_comm import AsyncCommunicator
from ..groups import ExpertGroups
from ..traffic import TrafficCounter
from .api import TokenExchange
from .config import ExchangeConfig
from .deepep import DeepEPExchange
from .deepep_buffer import DeepEPBufferShape
from .flat import FlatExchange
from .two_hop import TwoHopExchange


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
