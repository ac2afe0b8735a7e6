"""The provider of FP8 that a configuration names."""

from __future__ import annotations

import torch

from shoestring.trainer.precision.config import PrecisionConfig
from shoestring.trainer.precision.tiles import Scales


def test_the_configuration_chooses() -> None:
    assert PrecisionConfig().fp8(torch.device("cpu")) is None
    fp8 = PrecisionConfig(linear="fp8", scales="power_of_two").fp8(torch.device("cpu"))
    assert fp8 is not None
    assert fp8.scales is Scales.POWER_OF_TWO
