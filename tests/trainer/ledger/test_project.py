"""Several runs on one budget."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.ledger.small_ledger import Time
from shoestring.tests.trainer.ledger.timed_runs import BUDGET, HOUR, project_file, run
from shoestring.trainer.ledger.checkpoint_totals import carry_checkpoint_totals
from shoestring.trainer.ledger.project import Project, ProjectReader, ProjectTotals
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.ledger.work_journal import WorkJournal


def test_runs_of_a_project_share_a_budget_and_totals_are_cumulative(tmp_path: Path, time: Time) -> None:
    project = Project.read(project_file(tmp_path))
    first, second, third = project.runs
    run(first, time, 0.5 * HOUR)
    run(first, time, 0.25 * HOUR, first=2)  # started again
    run(first, time, 0.1 * HOUR, phase="context_extension", first=3)  # continues in another phase
    work = WorkJournal(second, ranks=1, attempt="second", budget=BUDGET)
    carry_checkpoint_totals(
        work, second, summarize_ledger(first).checkpoint_totals()
    )  # a copy of the first one's checkpoint, without its ledger
    work.close()
    run(second, time, HOUR, first=4)
    reader = ProjectReader(project)
    assert reader.gpu_hours_left("pre_train", second) == pytest.approx(2 - 0.75)
    assert reader.gpu_hours_left("pre_train", third) == pytest.approx(2 - 1.75)
    assert reader.gpu_hours_left("context_extension", third) == pytest.approx(0.4)
    totals = ProjectTotals.from_summaries(project, reader.summarize_runs())
    assert totals.gpu_ms_by_phase == {"pre_train": 1.75 * HOUR * 1000, "context_extension": 360_000, "post_training": 0}
    assert totals.tokens_by_phase == {"pre_train": 300, "context_extension": 100, "post_training": 0}
    assert totals.inherited_from_others_ms == 0  # the second one inherits the first one's cost
    run(third, time, 0.1 * HOUR)
    assert reader.gpu_hours_left("pre_train", second) == pytest.approx(2 - 0.85)  # read incrementally
    assert list(reader.summarize_runs()) == [first, second, third]


def test_what_a_project_inherits_from_outside_is_shown_separately(tmp_path: Path, time: Time) -> None:
    outside, project = tmp_path / "outside", Project.read(project_file(tmp_path))
    run(outside, time, HOUR)
    work = WorkJournal(project.runs[0], ranks=1, attempt="a", budget=BUDGET)
    carry_checkpoint_totals(work, project.runs[0], summarize_ledger(outside).checkpoint_totals())
    work.close()
    totals = ProjectTotals.from_summaries(project, ProjectReader(project).summarize_runs())
    assert (totals.allocated_ms, totals.inherited_from_others_ms) == (0, HOUR * 1000)


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("gpu_hours: {pre_train: 1}\nruns: [a, ./a]\n", "names a run twice"),
        ("gpu_hours: {nap: 1}\nruns: [a]\n", "no phase"),
        ("gpu_hours: {pre_train: -1}\nruns: [a]\n", "greater than 0"),
        ("gpu_hours: {pre_train: 1}\n", "must list the directories"),
        ("runs: [a]\n", "must give GPU-hours"),
        ("gpu_hours: {pre_train: 1}\nruns: [a]\nrun: b\n", "no such key"),
        ("- a\n", "must hold gpu_hours"),
        ("gpu_hours: [", "cannot be read"),
    ],
)
def test_a_project_that_makes_no_sense_is_refused(text: str, gist: str, tmp_path: Path) -> None:
    path = tmp_path / "project.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=gist):
        Project.read(path)
