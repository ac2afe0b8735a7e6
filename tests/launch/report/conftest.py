"""One recorded run and its page, for tests that only read them."""

from pathlib import Path

import pytest

from shoestring.launch.answers.page import html_page
from shoestring.launch.report.page import report_answer
from shoestring.launch.report.run_record import read_run_record
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import record_run, record_trace
from shoestring.tests.trainer.ledger.small_ledger import Time


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "my run & <i>"
    record_run(path)
    record_trace(path)
    return path


@pytest.fixture(scope="session")
def html(run_dir: Path) -> str:
    return html_page(report_answer(read_run_record(run_dir)), "shoestring report")


@pytest.fixture(scope="session")
def page(html: str) -> Reader:
    return Reader(html)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)
