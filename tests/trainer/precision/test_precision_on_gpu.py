"""The backends for Hopper GPUs against the reference, on one GPU. Not yet run on hardware."""

import pytest
import torch

from shoestring.tests.trainer.precision.against_reference import check_products, check_quantization, check_swiglu
from shoestring.trainer.precision.backend import open_backend, unavailable_reasons
from shoestring.trainer.precision.reference import ReferenceBackend, emulate_hopper_gemm

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("name", ["triton", "torch", "te"])
def test_every_operation_equals_the_reference(name: str) -> None:
    missing = list(unavailable_reasons(name, on_gpu=torch.cuda.is_available()))
    if missing:
        pytest.skip("; ".join(missing))
    torch.manual_seed(0)
    backend = open_backend(name, GPU)
    check_quantization(backend, GPU)
    check_swiglu(backend, GPU)
    check_products(backend, GPU, ReferenceBackend(emulate_hopper_gemm))
