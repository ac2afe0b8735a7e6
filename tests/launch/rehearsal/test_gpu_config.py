"""The configuration of a run as its GPUs would have it."""

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.gpu_config import gpu_run_config
from shoestring.tests.launch.rehearsal.rehearsed_rank import BF16, FP8


def test_what_cannot_be_rehearsed_is_refused() -> None:
    deepep = compose_run_config(["exchange=deepep", "topology=pp2_ep2"])
    with pytest.raises(ConfigError, match=r"exchange\.name = 'deepep': cannot be rehearsed"):
        gpu_run_config(deepep, None)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size = 6"):
        gpu_run_config(compose_run_config(BF16), 3)  # DualPipe on two ranks needs an even number
    with pytest.raises(ConfigError, match=r"precision\.compute = 'float32': cannot be rehearsed"):
        gpu_run_config(compose_run_config(["precision=fp32"]), None)


def test_a_run_is_taken_to_its_gpus() -> None:
    config = gpu_run_config(compose_run_config(FP8), 5)
    assert (config.training.device, config.training.attention_backend, config.precision.fp8_backend) == (
        "cuda",
        "cudnn",
        "triton",
    )
    assert config.num_micro_batches == 5
