"""The engine of a tiny model on one rank."""

from datetime import timedelta

import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import NULL_RECORDER
from shoestring.comm.watchdog import Watchdog
from shoestring.launch.compose import compose_run_config
from shoestring.tests.comm.nccl_rules import QueuedStreams
from shoestring.trainer.build import TrainingEngine, build_engine
from shoestring.trainer.config import RunConfig

CPU = torch.device("cpu")


def tiny() -> RunConfig:
    return compose_run_config(
        ["model=tiny", "schedule=dualpipev", "training.sequence_length=16", "training.global_batch_size=2"]
    )


def opened(config: RunConfig, watchdog: Watchdog | None = None, streams: QueuedStreams | None = None) -> TrainingEngine:
    groups = ProcessGroups.create(config.topology, 0, timedelta(seconds=1), (), None, watchdog)
    return build_engine(config, groups, CPU, NULL_RECORDER, streams)
