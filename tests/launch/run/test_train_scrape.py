"""A run that is scraped while it trains, is stopped, and is scraped again on the same port after its restart."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from shoestring.tests.launch.real_run import command, wait_for_step
from shoestring.tests.launch.small_run import BATCH, SEQUENCE, free_port, small_run
from shoestring.tests.trainer.telemetry.scraped import scrape
from shoestring.trainer.telemetry.history import read_metrics

pytestmark = pytest.mark.slow


def test_every_attempt_of_a_run_is_scraped(tmp_path: Path) -> None:
    port, run_dir = free_port(), tmp_path / "run"
    overrides = [*small_run(tmp_path, steps=1_000_000), f"telemetry.prometheus.port={port}", "telemetry.log_every=1"]
    first = scrape_attempt(overrides, run_dir, port, step=3)
    second = scrape_attempt(overrides, run_dir, port, step=int(first["shoestring_step"]) + 3)
    for found in (first, second):
        assert found["shoestring_tokens"] == found["shoestring_step"] * BATCH * SEQUENCE
        assert found["shoestring_steps_planned"] == 1_000_000
        assert 0 < found["shoestring_loss_nats"] < 7
        assert found["shoestring_gpu_hours"] + found["shoestring_budget_left_gpu_hours"] == pytest.approx(0.5)
    assert second["shoestring_gpu_hours"] > first["shoestring_gpu_hours"]
    events = read_metrics(run_dir / "metrics.jsonl")
    assert not [event for event in events if event.kind == "warning"]


def scrape_attempt(overrides: list[str], run_dir: Path, port: int, step: int) -> dict[str, float]:
    """Train until `step`, scrape, and ask the run to stop; return the samples."""
    with subprocess.Popen(command(overrides, run_dir), stdout=subprocess.DEVNULL, text=True) as process:
        try:
            wait_for_step(run_dir, process, step)
            while (found := scrape(port)).get("shoestring_step", 0) < step:
                os.sched_yield()  # the file is written first
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    return found
