"""The event stream of a run with the sinks that its configuration names."""

import io
import socket
from pathlib import Path

import pytest

from shoestring.trainer.telemetry.config import PrometheusConfig, TelemetryConfig, WandbConfig
from shoestring.trainer.telemetry.events import CheckpointSaved, WarningRaised
from shoestring.trainer.telemetry.history import read_all_metrics
from shoestring.trainer.telemetry.sinks import open_event_stream


@pytest.mark.timeout(20)
def test_a_port_that_is_taken_after_all_is_a_warning_and_the_run_continues(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        telemetry = TelemetryConfig(
            wandb=WandbConfig(mode="disabled"), prometheus=PrometheusConfig(port=other.getsockname()[1])
        )
        stream = open_event_stream(telemetry, tmp_path, io.StringIO())
        metrics, told = tmp_path / "metrics.jsonl", 0
        while not (warnings := [event for event in read_all_metrics(metrics) if isinstance(event, WarningRaised)]):
            stream.emit(CheckpointSaved(step=(told := told + 1), path=""))
        stream.emit(CheckpointSaved(step=(told := told + 1), path=""))
        stream.close()
    (warning,) = warnings
    assert "telemetry.prometheus.port" in warning.message
    assert [event.step for event in read_all_metrics(metrics) if event.kind == "checkpoint"] == [*range(1, told + 1)]
