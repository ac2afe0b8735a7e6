"""The warm-up before the first step leaves only what a step needs."""

from unittest.mock import patch

import torch

from shoestring.tests.comm.nccl_rules import QueuedStreams
from shoestring.tests.trainer.small_engine import CPU, opened, tiny
from shoestring.trainer.run.stage_runner import StageRunner
from shoestring.trainer.run.warm_up import warm_up_kernels, warm_up_step


def test_every_chunk_runs_forward_and_backward_and_nothing_of_it_stays() -> None:
    config = tiny()
    engine = opened(config)
    stepper, streams, shape = (
        engine.stepper,
        QueuedStreams(),
        (config.schedule.micro_batch_size, config.tokens_per_sample),
    )
    buckets = stepper.optimizer.reducer.buckets
    weights = [bucket.weights_N.clone() for bucket in buckets]
    biases = [router.bias_E.clone() for _, router in stepper.model.routers()]
    state = torch.get_rng_state()
    warm_up_kernels(stepper, shape, CPU)
    assert all(bool(bucket.grads_N.any()) for bucket in buckets)  # the backward went through all of them
    with patch.object(StageRunner, "backward", autospec=True, side_effect=StageRunner.backward) as backward:
        warm_up_step(stepper, engine.exchange_communicator, config.exchange.name, shape, CPU, streams)
    assert backward.call_count == len(stepper.chunks) == 2
    assert not any(bool(bucket.grads_N.any()) for bucket in buckets)
    assert all(torch.equal(old, bucket.weights_N) for old, bucket in zip(weights, buckets, strict=True))
    assert all(torch.equal(old, r.bias_E) for old, (_, r) in zip(biases, stepper.model.routers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    engine.close()
