"""Worker processes that run tasks, and that end with the process that started them."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.sharedctypes import Synchronized
from typing import TYPE_CHECKING, Any

from ....comm.errors import ConfigError, Problem
from ....comm.files.file_io import os_error_to_problem, unwritable_directory_hint
from .run_task import PreparationJob, TaskRecord, run_task
from .tasks import Task

if TYPE_CHECKING:
    _End = connection.Connection[Any, Any]
else:
    _End = connection.Connection  # takes no parameters at run time

_FINISHED = "what is finished is kept, and the same command continues"


@dataclass
class Progress:
    """Bytes of text and tokens that all workers have produced so far."""

    text_bytes: int = 0
    tokens: int = 0


def run_tasks(
    job: PreparationJob, tasks: Sequence[Task], workers: int, on_progress: Callable[[Progress], None]
) -> Iterator[tuple[Task, TaskRecord]]:
    """Run `tasks` in this process or in `workers` processes; yield each with its record when it is completed.

    `on_progress` is called several times a second. Raises `ConfigError` for the first task that fails, after stopping
    the others, and if a worker is killed.
    """
    if workers == 1:
        progress = Progress()

        def count(text_bytes: int, tokens: int) -> None:
            progress.text_bytes += text_bytes
            progress.tokens += tokens
            on_progress(progress)

        alone = replace(job, report_progress=count)
        for task in tasks:
            found = _try_task(alone, task)
            yield task, _record_or_raise(found)
        return
    yield from _Pool(job, workers).run(tasks, on_progress)


def _try_task(job: PreparationJob, task: Task) -> TaskRecord | tuple[Problem, ...]:
    """Run a task; return what is wrong with the corpus or the directory instead of raising."""
    try:
        return run_task(job, task)
    except ConfigError as error:
        return error.problems
    except OSError as error:
        fix = f"{unwritable_directory_hint(error)}; {_FINISHED}"
        return (os_error_to_problem(error, job.directory, fix),)


def _record_or_raise(found: TaskRecord | tuple[Problem, ...]) -> TaskRecord:
    if isinstance(found, TaskRecord):
        return found
    raise ConfigError(found)


class _Pool:
    """Processes that take one task after another. A process that is killed is noticed, which pools do not promise."""

    def __init__(self, job: PreparationJob, workers: int) -> None:
        self._job = job
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._counters = (context.Value("q", 0), context.Value("q", 0))
        self._processes: dict[_End, ForkServerProcess] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(job, theirs, self._counters), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, tasks: Sequence[Task], on_progress: Callable[[Progress], None]) -> Iterator[tuple[Task, TaskRecord]]:
        """Yield each task with its record, in the order of completion."""
        waiting, idle = list(reversed(tasks)), list(self._processes)
        running: dict[_End, Task] = {}
        try:
            while waiting or running:
                while waiting and idle:
                    end = idle.pop()
                    running[end] = waiting.pop()
                    with self._death_named(end):
                        end.send(running[end])
                for ready in connection.wait(list(running), timeout=0.25):
                    end = ready  # type: ignore[assignment]  # only connections are waited for
                    yield running.pop(end), self._receive(end)
                    idle.append(end)
                on_progress(Progress(self._counters[0].value, self._counters[1].value))
        finally:
            for process in self._processes.values():
                process.kill()
            for process in self._processes.values():
                process.join()

    def _receive(self, end: _End) -> TaskRecord:
        with self._death_named(end):
            return _record_or_raise(end.recv())

    @contextmanager
    def _death_named(self, end: _End) -> Iterator[None]:
        """Turn the error of a pipe whose process has died into a `ConfigError` that says how it died."""
        try:
            yield
        except (EOFError, ConnectionError):
            process = self._processes[end]
            process.join()
            code = process.exitcode or 0
            what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            hint = f"a worker process ended by {what}, maybe for lack of memory; lower data.workers; {_FINISHED}"
            raise ConfigError([Problem("data.workers", len(self._processes), hint)]) from None


def _work(
    job: PreparationJob,
    end: _End,
    counters: "tuple[Synchronized[int], Synchronized[int]]",
) -> None:
    """Run the tasks that come through `end`, one at a time, until it is closed."""
    # The terminal sends SIGINT to all of its processes; the one that started them decides and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core: threads would compete

    def count(text_bytes: int, tokens: int) -> None:
        if end.poll():  # nothing is sent during a task: the other end was closed by the death of its process
            os._exit(1)
        for counter, more in zip(counters, (text_bytes, tokens), strict=True):
            with counter.get_lock():
                counter.value += more

    counting = replace(job, report_progress=count)
    while True:
        try:
            task = end.recv()
        except (EOFError, OSError):
            return
        end.send(_try_task(counting, task))
