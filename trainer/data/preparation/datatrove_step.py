"""Preparation on many machines, by datatrove's executors: local processes, Slurm array jobs, Ray.

An executor runs one pipeline of this step in any number of jobs; each takes every n-th task of the preparation that has
no completion record. `shoestring data prepare` writes tokenizer and settings first, and the manifest when all is done.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from ....comm.errors import ConfigError, Problem
from .run_task import PreparationJob, find_record, run_task
from .tasks import Task

EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}


class PreparationTasks(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Step of a datatrove pipeline that runs this job's share of the tasks; it has no input and no output."""

    name = "Tokenize"
    type = "Shoestring"

    def __init__(self, job: PreparationJob, tasks: Iterable[Task]) -> None:
        """Take the job and all of its tasks."""
        super().__init__()
        self.job = job
        self.tasks = tuple(tasks)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[None]:
        """Run every `world_size`-th task from `rank` on. Raises `ConfigError` like `run_task`."""
        for task in self.tasks[rank::world_size]:
            if find_record(self.job.directory, task, self.job.settings) is None:
                with self.track_time():
                    record = run_task(self.job, task)
                for part in (record.part.train, record.part.validation):
                    if part is not None:
                        self.stat_update("tokens", value=part.tokens, unit="task")
                        self.stat_update("documents", value=part.documents, unit="task")
        return iter(())


def submit_tasks(job: PreparationJob, tasks: Iterable[Task], executor: str, jobs: int, options: dict[str, Any]) -> None:
    """Run the tasks by an executor of datatrove in `jobs` jobs; `options` are arguments of its constructor.

    Returns when they are done (`local`, `ray`) or submitted (`slurm`). Raises `ConfigError` for an option that the
    executor does not have or misses.
    """
    logs = str(job.directory / "logs")
    try:
        # A step that has no record runs, whatever datatrove remembers of an earlier call.
        chosen = EXECUTORS[executor](
            pipeline=[PreparationTasks(job, tasks)], tasks=jobs, logging_dir=logs, skip_completed=False, **options
        )
    except TypeError as error:
        hint = f"datatrove's executor says: {error}"
        raise ConfigError([Problem("--executor-option", options, hint)]) from error
    chosen.run()
