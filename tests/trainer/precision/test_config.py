"""The FP8 backend that a configuration names."""

import torch

from shoestring.trainer.precision.config import PrecisionConfig
from shoestring.trainer.precision.fp8_tensors import ScaleFormat


def test_the_configuration_chooses() -> None:
    assert PrecisionConfig().build_fp8_ops(torch.device("cpu")) is None
    fp8 = PrecisionConfig(linear="fp8", fp8_scale_format="power_of_two").build_fp8_ops(torch.device("cpu"))
    assert fp8 is not None
    assert fp8.scale_format is ScaleFormat.POWER_OF_TWO
