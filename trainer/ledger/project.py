"""Project: several runs that share one budget. A project file names the runs and the budget of each phase.

gpu_hours:
  pre_train: 2664000
  context_extension: 119000
runs:            # directories relative to the file; a run may not exist yet
  - runs/pre_train
  - runs/context_extension
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...comm.errors import Problem, raise_if_any
from ...comm.files.file_io import config_error_context
from ...comm.files.strict_yaml import read_yaml
from .journal import contains_record
from .summary import LedgerReader, LedgerSummary
from .terms import PUBLISHED_GPU_HOURS, WORK_FILE, to_gpu_hours


@dataclass(frozen=True)
class Project:
    """Runs that share a budget."""

    path: Path
    gpu_hours: Mapping[str, float]
    """Budget of each phase."""
    runs: Sequence[Path]
    """Run directories."""

    @staticmethod
    def read(path: Path) -> "Project":
        """Read a project file. Raises `ConfigError` with all its problems."""
        with config_error_context(path, "it cannot be read as a project; correct it"):
            tree = read_yaml(path)
        budgets, runs = (tree.get(key) for key in ("gpu_hours", "runs")) if isinstance(tree, dict) else (None, None)
        raise_if_any(_problems(path, tree, budgets, runs))
        assert isinstance(budgets, dict) and isinstance(runs, list)  # noqa: PT018
        directories = [Path(os.path.realpath(path.parent / run)) for run in runs]
        return Project(path, {str(phase): float(hours) for phase, hours in budgets.items()}, directories)

    def has_run(self, run_dir: Path) -> bool:
        """Return True if `run_dir` is one of the project's runs."""
        return Path(os.path.realpath(run_dir)) in self.runs


def _problems(path: Path, tree: object, budgets: Any, runs: Any) -> Iterator[Problem]:
    if not isinstance(tree, dict):
        yield Problem(str(path), None, "must hold gpu_hours (by phase) and runs (a list of directories)")
        return
    for key in tree:
        if key not in ("gpu_hours", "runs"):
            yield Problem(f"{path}, {key}", tree[key], "no such key; a project holds gpu_hours and runs")
    if not isinstance(budgets, dict) or not budgets:
        yield Problem(
            f"{path}, gpu_hours", budgets, f"must give GPU-hours for phases: {', '.join(PUBLISHED_GPU_HOURS)}"
        )
    else:
        for phase, hours in budgets.items():
            if phase not in PUBLISHED_GPU_HOURS:
                yield Problem(f"{path}, gpu_hours.{phase}", hours, f"no phase; one of {', '.join(PUBLISHED_GPU_HOURS)}")
            elif isinstance(hours, bool) or not isinstance(hours, int | float) or not 0 < hours < math.inf:
                yield Problem(f"{path}, gpu_hours.{phase}", hours, "must be greater than 0 and finite")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, str) and run for run in runs):
        yield Problem(f"{path}, runs", runs, "must list the directories of runs")
    elif len({Path(os.path.realpath(path.parent / run)) for run in runs}) < len(runs):
        yield Problem(f"{path}, runs", runs, "names a run twice, which would be counted twice; name it once")


class ProjectReader:
    """Incremental reader of the ledgers of a project's runs."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self._readers = {run: LedgerReader(run) for run in project.runs}

    def summarize_runs(self) -> dict[Path, LedgerSummary]:
        """Return the summary of each run that has a ledger. Raises `ConfigError` for a broken one."""
        existing = {run: reader for run, reader in self._readers.items() if (run / WORK_FILE).parent.is_dir()}
        return {run: reader.summarize() for run, reader in existing.items()}

    def gpu_hours_left(self, phase: str, run_dir: Path) -> float:
        """Return the GPU-hours of the phase's budget that the runs other than `run_dir` leave."""
        spent_ms = sum(
            summary.gpu_ms_by_phase.get(phase, 0)
            for run, summary in self.summarize_runs().items()
            if run != Path(os.path.realpath(run_dir))
        )
        return max(0.0, self.project.gpu_hours.get(phase, 0.0) - to_gpu_hours(spent_ms))


@dataclass(frozen=True)
class ProjectTotals:
    """Cost of a project. Inherited cost counts in the run that it comes from, if that is in the project."""

    allocated_ms: int
    gpu_ms_by_phase: Mapping[str, int]
    tokens_by_phase: Mapping[str, int]
    """Tokens retained by steps of these runs, without inherited ones."""
    inherited_from_others_ms: int
    """Cost inherited from runs outside the project."""

    @staticmethod
    def from_summaries(project: Project, summaries: Mapping[Path, LedgerSummary]) -> "ProjectTotals":
        """Return the sum of the runs' summaries."""
        by_phase = dict.fromkeys(PUBLISHED_GPU_HOURS, 0)
        tokens = dict.fromkeys(PUBLISHED_GPU_HOURS, 0)
        outside_ms = 0
        for summary in summaries.values():
            for phase, spent_ms in summary.gpu_ms_by_phase.items():
                by_phase[phase] += spent_ms
            for phase, retained in summary.tokens_by_phase.items():
                tokens[phase] += retained
            head = summary.inherited_head
            if head is not None and not any(contains_record(run / WORK_FILE, head) for run in summaries):
                outside_ms += summary.inherited_ms
        return ProjectTotals(sum(by_phase.values()), by_phase, tokens, outside_ms)
