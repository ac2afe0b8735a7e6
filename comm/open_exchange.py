"""The exchange that a configuration names."""

from __future__ import annotations

from typing import Any

from .config import ExchangeConfig
from .exchange import TokenExchange
from .flat import FlatExchange
from .groups import ProcessGroups
from .pending import Worker
from .traffic import Traffic
from .two_hop import TwoHopExchange


def open_exchange(
    config: ExchangeConfig, groups: ProcessGroups, experts: int, worker: Worker, traffic: Traffic
) -> TokenExchange[Any]:
    """The exchange between the `experts` of one layer over the expert-parallel group of this rank."""
    if config.name == "flat":
        return FlatExchange(groups, experts, worker, traffic, config)
    return TwoHopExchange(groups, experts, worker, traffic, config)
