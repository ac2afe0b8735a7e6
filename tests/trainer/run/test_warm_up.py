"""What a rank does before its first step leaves nothing behind but what a step needs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import SILENT
from shoestring.comm.watchdog import Watchdog
from shoestring.launch.compose import compose_run
from shoestring.tests.comm.nccl_rules import QueuedStreams
from shoestring.trainer.build import Engine, open_engine
from shoestring.trainer.config import RunConfig
from shoestring.trainer.run.stage_runner import StageRunner
from shoestring.trainer.run.warm_up import load_kernels, warm_up

CPU = torch.device("cpu")


def tiny() -> RunConfig:
    return compose_run(["model=tiny", "schedule=dualpipev", "training.sequence_length=16", "training.global_batch=2"])


def opened(config: RunConfig, watchdog: Watchdog | None = None, streams: QueuedStreams | None = None) -> Engine:
    groups = ProcessGroups.create(config.topology, 0, timedelta(seconds=1), (), None, watchdog)
    return open_engine(config, groups, CPU, SILENT, streams)


def test_every_chunk_runs_forward_and_backward_and_nothing_of_it_stays() -> None:
    config = tiny()
    engine = opened(config)
    stepper, streams, shape = engine.stepper, QueuedStreams(), (config.schedule.micro_batch, config.window)
    buckets = stepper.optimizer.reducer.buckets
    weights = [bucket.weights_N.clone() for bucket in buckets]
    biases = [router.bias_E.clone() for _, router in stepper.model.routers()]
    state = torch.get_rng_state()
    load_kernels(stepper, shape, CPU)
    assert all(bool(bucket.grads_N.any()) for bucket in buckets)  # the backward went through all of them
    with patch.object(StageRunner, "backward", autospec=True, side_effect=StageRunner.backward) as backward:
        warm_up(stepper, engine.worker, config.exchange.name, shape, CPU, streams)
    assert backward.call_count == len(stepper.chunks) == 2
    assert not any(bool(bucket.grads_N.any()) for bucket in buckets)
    assert all(torch.equal(old, bucket.weights_N) for old, bucket in zip(weights, buckets, strict=True))
    assert all(torch.equal(old, r.bias_E) for old, (_, r) in zip(biases, stepper.model.routers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    engine.close()


def test_an_engine_warms_up_where_there_are_streams_and_not_on_plain_gloo() -> None:
    for streams, times in ((QueuedStreams(), 1), (None, 0)):
        with patch("shoestring.trainer.build.warm_up") as warm:
            opened(tiny(), streams=streams).close()
        assert warm.call_count == times


def test_a_call_has_the_limit_of_the_start_until_the_engine_is_open(tmp_path: Path) -> None:
    config = tiny()
    watchdog = Watchdog(0, timedelta(seconds=config.training.start_timeout_seconds), tmp_path)
    opened(config, watchdog).close()
    assert watchdog.limit == timedelta(seconds=config.training.collective_timeout_seconds)
    assert config.training.start_timeout_seconds > config.training.collective_timeout_seconds
