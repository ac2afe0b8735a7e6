"""The reporter of other ranks than 0."""

from shoestring.trainer.run.null_reporter import NullReporter
from shoestring.trainer.run.reporter import Reporter


def test_a_reporter_of_another_rank_does_nothing_in_any_report() -> None:
    """It opens no file, so a report that it inherited would fail."""
    reports = {name for name in vars(Reporter) if not name.startswith("_")}
    assert reports == {name for name in vars(NullReporter) if not name.startswith("_")}
    assert not vars(NullReporter())
