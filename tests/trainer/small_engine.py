"""The engine of a tiny model on one rank."""

from __future__ import annotations

from datetime import timedelta

import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import SILENT
from shoestring.comm.watchdog import Watchdog
from shoestring.launch.compose import compose_run
from shoestring.tests.comm.nccl_rules import QueuedStreams
from shoestring.trainer.build import Engine, open_engine
from shoestring.trainer.config import RunConfig

CPU = torch.device("cpu")


def tiny() -> RunConfig:
    return compose_run(["model=tiny", "schedule=dualpipev", "training.sequence_length=16", "training.global_batch=2"])


def opened(config: RunConfig, watchdog: Watchdog | None = None, streams: QueuedStreams | None = None) -> Engine:
    groups = ProcessGroups.create(config.topology, 0, timedelta(seconds=1), (), None, watchdog)
    return open_engine(config, groups, CPU, SILENT, streams)
