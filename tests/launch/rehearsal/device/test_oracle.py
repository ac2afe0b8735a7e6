"""What a rehearsed GPU tells its host: sizes inside a dispatch, and ones elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from shoestring.launch.compose import compose_run
from shoestring.launch.rehearsal.device.oracle import BalancedOracle
from shoestring.launch.rehearsal.device.routing import BalancedRouting
from shoestring.launch.rehearsal.device.spans import Spans


def test_sizes_are_those_of_balanced_routing() -> None:
    config = compose_run(["topology=pp2_ep2", "exchange=flat"])
    spans = SimpleNamespace(is_dispatch=True, what="dispatch")
    oracle = BalancedOracle(config, 1, cast("Spans", spans))
    sizes = torch.tensor(BalancedRouting.of(config).flat(1))
    assert torch.equal(oracle.answer(torch.zeros_like(sizes)), sizes)
    with pytest.raises(NotImplementedError, match=r"dispatch reads torch.float32 \[1\]"):
        oracle.answer(torch.zeros(1))
    spans.is_dispatch = False
    assert torch.equal(oracle.answer(torch.zeros_like(sizes)), torch.ones_like(sizes))
