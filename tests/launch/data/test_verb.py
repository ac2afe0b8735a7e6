"""`shoestring data inspect` on the prepared data of a small corpus."""

from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.launch.answers.terminal import terminal_text
from shoestring.launch.compose import compose_run_config
from shoestring.launch.data.verb import inspect_answer
from shoestring.tests.launch.command_line import answer, tree_of
from shoestring.tests.launch.renderings import check_renderings

TEXT = "The owl and the pussycat went to sea in a beautiful pea-green boat. "


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    (corpus := root / "corpus").mkdir()
    for name in ("alpha", "held"):
        (corpus / f"{name}.txt").write_text(TEXT * 20)
    sizes = ("data.vocab_size=300", "model.vocab_size=300", "data.validation=[held]")
    return [f"data.corpus={corpus}", f"data.prepared={root}/prepared", *sizes]


def test_prepare_ends_with_what_inspect_prints(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    prepared = Path(compose_run_config(overrides).data.prepared)
    printed = answer(capsys, "data", "prepare", *overrides)
    text = answer(capsys, "data", "inspect", *overrides)
    assert printed.endswith(text)
    assert f"Start of the training text:\n{TEXT}" in text
    tree = tree_of(capsys, "data", "inspect", *overrides)
    assert [split["name"] for split in tree["splits"]] == ["train", "validation"]
    assert tree["splits"][0]["first_files"] == ["alpha.txt"]
    check_renderings(inspect_answer(prepared), smallest_number_of_quantities=12)


def test_codes_in_the_text_of_others_are_shown_as_text(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.trainer.data import inspect

    found = inspect.describe_prepared_data(Path(compose_run_config(overrides).data.prepared))
    monkeypatch.setattr(inspect, "describe_prepared_data", lambda directory: replace(found, excerpt="\x1b[2J"))
    assert "\\x1b[2J" in terminal_text(inspect_answer(Path("prepared")), colors=False)
