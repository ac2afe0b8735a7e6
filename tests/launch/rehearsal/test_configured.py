"""The configuration of a run as its GPUs would have it."""

from __future__ import annotations

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run
from shoestring.launch.rehearsal.configured import on_gpu
from shoestring.tests.launch.rehearsal.rehearsed_rank import BF16, FP8


def test_what_cannot_be_rehearsed_is_refused() -> None:
    deepep = compose_run(["exchange=deepep", "topology=pp2_ep2"])
    with pytest.raises(ConfigError, match=r"exchange\.name = 'deepep': cannot be rehearsed"):
        on_gpu(deepep, None)
    with pytest.raises(ConfigError, match=r"training\.global_batch = 6"):
        on_gpu(compose_run(BF16), 3)  # DualPipe of two ranks wants an even number
    with pytest.raises(ConfigError, match=r"precision\.compute = 'float32': cannot be rehearsed"):
        on_gpu(compose_run(["precision=fp32"]), None)


def test_a_run_is_taken_to_its_gpus() -> None:
    config = on_gpu(compose_run(FP8), 5)
    assert (config.training.device, config.training.attention, config.precision.provider) == ("cuda", "cudnn", "triton")
    assert config.micro_batches == 5
