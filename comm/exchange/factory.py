"""The exchange that a configuration names."""

from __future__ import annotations

from typing import Any

from ..async_comm import AsyncCommunicator
from ..groups import ProcessGroups
from ..traffic import Traffic
from .api import TokenExchange
from .config import ExchangeConfig
from .deepep import DeepEPExchange
from .deepep_buffer import BufferShape
from .flat import FlatExchange
from .two_hop import TwoHopExchange


def open_exchange(
    config: ExchangeConfig,
    groups: ProcessGroups,
    experts: int,
    worker: AsyncCommunicator,
    traffic: Traffic,
    shape: BufferShape | None = None,
) -> TokenExchange[Any]:
    """The exchange between the `experts` of one layer over the expert-parallel group of this rank.

    Only `deepep` needs to know beforehand what it will carry, the `shape`. Opening it is collective.
    """
    if config.name == "deepep":
        assert shape is not None
        return DeepEPExchange(groups, experts, worker, config, shape)
    if config.name == "flat":
        return FlatExchange(groups, experts, worker, traffic, config)
    return TwoHopExchange(groups, experts, worker, traffic, config)
