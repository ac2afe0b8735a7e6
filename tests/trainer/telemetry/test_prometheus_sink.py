"""Prometheus scrapes of a run over the network, and a port that is in use."""

import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.small_run import free_port
from shoestring.tests.trainer.telemetry.scraped import scrape
from shoestring.tests.trainer.telemetry.written_events import EVALUATION, RUN, step
from shoestring.trainer.telemetry.config import PrometheusConfig
from shoestring.trainer.telemetry.events import CheckpointSaved, RunResumed, WarningRaised
from shoestring.trainer.telemetry.prometheus_sink import PrometheusSink, port_problems

STEP = step(40, 5.25, mtp_loss=None, metrics={"load/max_violation": 0.75}, time=12.5)


@pytest.fixture
def config() -> PrometheusConfig:
    return PrometheusConfig(port=free_port())


@pytest.fixture
def sink(config: PrometheusConfig, tmp_path: Path) -> Iterator[PrometheusSink]:
    sink = PrometheusSink(config, tmp_path)
    yield sink
    sink.close()


def port_of(config: PrometheusConfig) -> int:
    assert config.port is not None
    return config.port


def test_a_scrape_gets_the_figures_of_the_last_events(config: PrometheusConfig, sink: PrometheusSink) -> None:
    assert scrape(port_of(config)) == {}  # unknown values are absent, not 0
    sink.emit(RUN)
    sink.emit(replace(EVALUATION, loss=5.5))
    sink.emit(STEP)
    assert scrape(port_of(config)) == {
        "shoestring_run_info compute_dtype=float32 device=cpu linear=native ranks=4": 1,
        "shoestring_step": 40,
        "shoestring_last_event_timestamp_seconds": 12.5,
        "shoestring_loss_nats": 5.25,
        "shoestring_balance_loss": 1e-4,
        "shoestring_gradient_norm": 0.812,
        "shoestring_learning_rate": 2e-3,
        "shoestring_validation_loss_nats": 5.5,
        "shoestring_tokens": 81920,
        "shoestring_tokens_per_second": 6104,
        "shoestring_mfu_ratio": 0.3894,
        "shoestring_gpu_hours": 0.0123,
        "shoestring_budget_left_gpu_hours": 0.9877,
        "shoestring_goodput_ratio": 0.5,
        "shoestring_eta_seconds": 83.2,
        "shoestring_steps_planned": 400,
        "shoestring_load_max_violation": 0.75,
    }


def test_a_loss_that_is_not_a_number_and_warnings_are_seen(config: PrometheusConfig, sink: PrometheusSink) -> None:
    sink.emit(step(41, math.nan))
    for about in ("spike", "stall", "spike"):
        sink.emit(WarningRaised(step=41, about=about, message="…"))
    sink.emit(WarningRaised(step=41, message="a view is lost"))
    found = scrape(port_of(config))
    assert math.isnan(found["shoestring_loss_nats"])
    warnings = {name.split("=")[1]: count for name, count in found.items() if name.startswith("shoestring_warnings")}
    assert warnings == {"spike": 2, "stall": 1, "telemetry": 1}


def test_a_resume_takes_steps_back(config: PrometheusConfig, sink: PrometheusSink) -> None:
    sink.emit(STEP)
    sink.emit(RunResumed(step=30))
    assert scrape(port_of(config))["shoestring_step"] == 30


def test_a_checkpoint_that_is_done_later_takes_no_step_back(config: PrometheusConfig, sink: PrometheusSink) -> None:
    for event in (RUN, STEP, CheckpointSaved(step=30, path="step_00000030")):
        sink.emit(event)
    assert scrape(port_of(config))["shoestring_step"] == 40


def test_the_next_attempt_listens_on_the_same_port_immediately(config: PrometheusConfig, tmp_path: Path) -> None:
    for number in range(3):
        sink = PrometheusSink(config, tmp_path)
        sink.emit(step(number))
        assert scrape(port_of(config))["shoestring_step"] == number
        sink.close()
    assert not list(port_problems(config))


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = PrometheusConfig(port=other.getsockname()[1])
        (problem,) = port_problems(config)
        assert problem.field == "telemetry.prometheus.port"
        assert "Address already in use" in problem.hint
        with pytest.raises(ConfigError, match="Address already in use"):
            PrometheusSink(config, Path("run"))


def test_an_address_that_is_not_of_this_machine_is_refused() -> None:
    (problem,) = port_problems(PrometheusConfig(port=free_port(), address="192.0.2.1"))  # reserved for documentation
    assert "192.0.2.1" in problem.hint


def test_no_port_is_no_problem() -> None:
    assert not list(port_problems(PrometheusConfig()))
