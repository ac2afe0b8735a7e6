"""The token dispatcher: every all-to-all between routers and experts, behind one interface."""

from ..groups import ExpertGroups
from .api import DispatchedTokens, TokenExchange
from .autograd import combine, dispatch
from .config import ExchangeConfig
from .flat import FlatExchange
from .two_hop import TwoHopExchange

__all__ = [
    "DispatchedTokens",
    "ExchangeConfig",
    "ExpertGroups",
    "FlatExchange",
    "TokenExchange",
    "TwoHopExchange",
    "combine",
    "dispatch",
]
