"""Values that a rehearsed GPU returns to its host: sizes inside a dispatch, ones elsewhere."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.device.readback import BalancedReadback
from shoestring.launch.rehearsal.device.routing import BalancedRouting
from shoestring.launch.rehearsal.device.spans import RehearsalSpanRecorder


def test_sizes_are_those_of_balanced_routing() -> None:
    config = compose_run_config(["topology=pp2_ep2", "exchange=flat"])
    spans = SimpleNamespace(is_inside_dispatch=True, innermost_span_name="dispatch")
    readback = BalancedReadback(config, 1, cast("RehearsalSpanRecorder", spans))
    sizes = torch.tensor(BalancedRouting.from_config(config).flat_exchange_sizes(1))
    assert torch.equal(readback.read(torch.zeros_like(sizes)), sizes)
    with pytest.raises(NotImplementedError, match=r"dispatch reads torch.float32 \[1\]"):
        readback.read(torch.zeros(1))
    spans.is_inside_dispatch = False
    assert torch.equal(readback.read(torch.zeros_like(sizes)), torch.ones_like(sizes))
