"""Executors of datatrove run the tasks, and the result is that of one process."""

import os
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.small_corpus import silent
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.datatrove_step import PreparationTasks, submit_tasks
from shoestring.trainer.data.preparation.prepare import begun_preparation, prepare_corpus
from shoestring.trainer.data.preparation.tasks import plan_tasks

# Stands in for Slurm: runs the array jobs of a batch file one after the other.
SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
NODE = {{"SLURM_NODELIST": "n0", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}}
count = int(re.search(r"--array=0-(\\d+)", text).group(1)) + 1
for number in range(count):
    subprocess.run(["bash", sys.argv[-1]], env=os.environ | {{"SLURM_ARRAY_TASK_ID": str(number), **NODE}}, check=True,
                   stdout=sys.stderr)
print("Submitted batch job 7")
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""


def contents(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


@pytest.fixture
def alone(config: DataConfig) -> dict[str, bytes]:
    other = replace(config, prepared=config.prepared + "_alone")
    prepare_corpus(other, silent)
    return contents(other.prepared)


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/bash\necho $3\n")):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join((str(folder), sysconfig.get_path("scripts"), os.environ["PATH"])))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def test_slurm_jobs_share_the_tasks(
    config: DataConfig, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(tmp_path / "bin", monkeypatch)
    options = {"time": "1:00:00", "partition": "cpu", "requeue_signals": []}
    with begun_preparation(config, silent) as (job, files):
        submit_tasks(job, plan_tasks(files), "slurm", 2, options)
    lines: list[str] = []
    prepare_corpus(config, lines.append)
    assert "3 of 3 tasks were finished before and are kept." in lines
    assert contents(config.prepared) == alone


def test_local_processes_share_the_tasks(config: DataConfig, alone: dict[str, bytes]) -> None:
    with begun_preparation(config, silent) as (job, files):
        submit_tasks(job, plan_tasks(files), "local", 1, {})
    lines: list[str] = []
    prepare_corpus(config, lines.append)
    assert "3 of 3 tasks were finished before and are kept." in lines
    assert contents(config.prepared) == alone


def test_every_task_belongs_to_one_job_and_finished_ones_are_left(config: DataConfig) -> None:
    with begun_preparation(config, silent) as (job, files):
        step = PreparationTasks(job, plan_tasks(files))
        for rank, done in enumerate((2, 3)):
            list(step.run(iter(()), rank, 2))
            assert len(list((job.directory / "tasks").glob("*.json"))) == done
        before = [path.stat().st_mtime_ns for path in sorted((job.directory / "tasks").glob("*.json"))]
        list(step.run(iter(()), 0, 1))
        assert [path.stat().st_mtime_ns for path in sorted((job.directory / "tasks").glob("*.json"))] == before


def test_an_option_that_the_executor_misses_is_named(config: DataConfig) -> None:
    with begun_preparation(config, silent) as (job, files):
        tasks = plan_tasks(files)
        with pytest.raises(ConfigError, match=r"(?s)--executor-option.*time"):
            submit_tasks(job, tasks, "slurm", 2, {"partition": "cpu"})
