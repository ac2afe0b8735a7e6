"""Files that a run has left, and the missing ones."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.report.run_record import read_run_record
from shoestring.launch.run.run_dir import create_run_dir
from shoestring.tests.launch.report.recorded import record_run, report_of


def test_what_was_not_recorded_is_named_with_what_records_it(tmp_path: Path) -> None:
    record_run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if '"kind": "memory"' not in line]
    metrics.write_text("".join(kept))
    page = report_of(tmp_path)
    assert "telemetry.trace=true" in page.words("schedule")
    assert "simulated" in page.words("schedule")
    assert "telemetry.terms_every" in page.words("memory")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: !!python/object:os.system {}", "5"])
def test_a_config_yaml_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    """The file is read where no rank has recorded the configuration."""
    create_run_dir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml.*restore it, or remove it"):
        read_run_record(tmp_path)
