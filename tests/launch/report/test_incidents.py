"""Incidents of a run in their order."""

from shoestring.tests.launch.report.reader import Reader


def test_incidents_come_in_order(page: Reader) -> None:
    words = page.words("incidents")
    told = ["spike", "a rank died (torchrun exit code 1)", "resumed from step 4; 2 steps undone"]
    places = [words.index(text) for text in told]
    assert places == sorted(places)
    assert "steps done" not in words
