"""The providers for Hopper GPUs against their twins, on one. Not yet run on hardware."""

from __future__ import annotations

import pytest
import torch

from shoestring.tests.trainer.precision.against_twins import check_products, check_quantization, check_swiglu
from shoestring.trainer.precision.backend import missing_for, open_provider
from shoestring.trainer.precision.reference import Reference, hopper_sum

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("name", ["triton", "torch", "te"])
def test_every_operation_is_its_twin(name: str) -> None:
    missing = list(missing_for(name, on_gpu=torch.cuda.is_available()))
    if missing:
        pytest.skip("; ".join(missing))
    torch.manual_seed(0)
    provider = open_provider(name, GPU)
    check_quantization(provider, GPU)
    check_swiglu(provider, GPU)
    check_products(provider, GPU, Reference(hopper_sum))
