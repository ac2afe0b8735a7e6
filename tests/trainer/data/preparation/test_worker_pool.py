"""Processes that run tasks: all results, one clear error, and none left behind."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.small_corpus import silent
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.prepare import begun_preparation
from shoestring.trainer.data.preparation.run_task import PreparationJob
from shoestring.trainer.data.preparation.tasks import Task, plan_tasks
from shoestring.trainer.data.preparation.worker_pool import Progress, run_tasks


@pytest.fixture
def begun(config: DataConfig) -> Iterator[tuple[PreparationJob, tuple[Task, ...]]]:
    for number in range(5):
        (Path(config.corpus_location) / f"more{number}.txt").write_text("more text " * 200)
    with begun_preparation(config, silent) as (job, files):
        yield job, plan_tasks(files)


def children() -> set[str]:
    return {path.name for path in Path("/proc").iterdir() if path.name.isdigit() and _is_worker(path)}


def _is_worker(path: Path) -> bool:
    try:
        return b"multiprocessing.forkserver" in (path / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_run_once_with_progress(begun: tuple[PreparationJob, tuple[Task, ...]], workers: int) -> None:
    job, tasks = begun
    seen: list[Progress] = []
    found = dict(run_tasks(job, tasks, workers, lambda progress: seen.append(replace(progress))))
    assert set(found) == set(tasks)
    parts = [record.part for record in found.values()]
    total = sum(split.tokens for part in parts for split in (part.train, part.validation) if split is not None)
    assert seen[-1].tokens <= total
    if workers == 1:
        assert seen[-1].tokens == total


def test_a_worker_that_is_killed_is_named_and_the_others_end(begun: tuple[PreparationJob, tuple[Task, ...]]) -> None:
    job, tasks = begun
    before = children()

    def kill(progress: Progress) -> None:
        for process in sorted(children() - before, key=int)[-1:]:
            os.kill(int(process), signal.SIGKILL)

    with pytest.raises(ConfigError, match="a worker process ended by SIGKILL, maybe for lack of memory"):
        list(run_tasks(job, [*tasks] * 40, 2, kill))
    done = len(list((job.directory / "tasks").glob("*.json")))
    assert done <= len(tasks)


def test_a_broken_file_stops_all_with_one_error(config: DataConfig) -> None:
    (Path(config.corpus_location) / "zz.jsonl").write_text('{"text": "good"}\n{\n')
    with begun_preparation(replace(config, max_bad_records=1), silent) as (job, files):
        tasks = plan_tasks(files)
        with pytest.raises(ConfigError, match=r"zz\.jsonl = 'line 2'"):
            list(run_tasks(replace(job, max_bad_records=0), tasks, 2, lambda progress: None))


def test_a_directory_that_cannot_be_written_is_one_error(
    begun: tuple[PreparationJob, tuple[Task, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoestring.trainer.data.preparation import worker_pool

    def full(job: PreparationJob, task: Task) -> None:
        raise OSError(28, "No space left on device", str(job.directory / "x.bin"))

    monkeypatch.setattr(worker_pool, "run_task", full)
    job, tasks = begun
    with pytest.raises(ConfigError, match=r"x\.bin.*No space left on device; make room, .* the same command continues"):
        list(run_tasks(job, tasks, 1, lambda progress: None))
