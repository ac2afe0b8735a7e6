"""The engine of a rank: when it warms up, and the limit of its first calls."""

from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

from shoestring.comm.watchdog import Watchdog
from shoestring.tests.comm.nccl_rules import QueuedStreams
from shoestring.tests.trainer.small_engine import opened, tiny


def test_an_engine_warms_up_where_there_are_streams_and_not_on_plain_gloo() -> None:
    for streams, times in ((QueuedStreams(), 1), (None, 0)):
        with patch("shoestring.trainer.build.warm_up_step") as warm:
            opened(tiny(), streams=streams).close()
        assert warm.call_count == times


def test_a_call_has_the_limit_of_the_start_until_the_engine_is_open(tmp_path: Path) -> None:
    config = tiny()
    watchdog = Watchdog(0, timedelta(seconds=config.training.start_timeout_seconds), tmp_path)
    opened(config, watchdog).close()
    assert watchdog.timeout == timedelta(seconds=config.training.collective_timeout_seconds)
    assert config.training.start_timeout_seconds > config.training.collective_timeout_seconds
