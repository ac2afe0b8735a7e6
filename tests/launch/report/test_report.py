"""`shoestring report`: one page that loads nothing, has the run's figures, and names what was not recorded."""

import re
from pathlib import Path

from shoestring import __version__
from shoestring.launch.run.run_dir import create_run_dir
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import report_of

SECTIONS = ["", "loss", "budget", "schedule", "experts", "memory", "incidents", "configuration"]


def test_the_page_loads_nothing(html: str, page: Reader) -> None:
    assert page.loaded
    assert all(value.startswith("#") for value in page.loaded)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"'\s<]*", html)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_every_section_is_there_and_text_of_the_run_stays_text(page: Reader) -> None:
    assert list(page.text) == SECTIONS
    assert "my run & <i>" in page.words()
    assert "Speak, hands & <b>feet</b>" in page.words("loss")
    assert "the loss <script>alert(1)</script> jumped" in page.words("incidents")


def test_the_footer_names_the_version_that_made_the_page(html: str) -> None:
    assert f"Made by <code>shoestring report</code> {__version__} on" in html


def test_memory_and_expert_load(page: Reader) -> None:
    assert "rank 1 200 MB 310 MB" in page.words("memory")
    assert "layer 01" in page.words("experts")
    assert "last: 0.00 to 2.00 of the mean, 1 unused" in page.words("experts")


def test_the_configuration_is_whole(run_dir: Path, page: Reader) -> None:
    words = page.words("configuration")
    for text in (
        "routed_scaling_factor 2.5",
        "name dualpipev",
        "layers_per_stage null",
        "mtp_loss_scaling_factor.0 0.3",
        f"run_dir {run_dir}",
    ):
        assert text in words


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    create_run_dir(tmp_path)
    page = report_of(tmp_path)
    assert list(page.text) == SECTIONS
    assert "not started" in page.words()
    assert "no step yet" in page.words()
    assert "No curves: no step is logged yet" in page.words("loss")
    assert "there is no ledger yet" in page.words("budget")
    assert "No timeline" in page.words("schedule")
    assert "Nothing is recorded yet" in page.words("incidents")
    assert "not recorded" in page.words("configuration")
