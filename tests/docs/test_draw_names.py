"""docs/draw_names.py draws public names only, and the same ones for one seed."""

import sys

import pytest

from shoestring.docs import draw_names

SOURCE = """
def _hidden(): ...
def shown(a, /, b, *, c): ...
class _Hidden:
    def method(self): ...
class Shown:
    def method(self, a): ...
    def _hidden(self): ...
    @property
    def width(self): ...
    @classmethod
    def build(cls, a): ...
"""


def test_public_names_of_a_module() -> None:
    assert list(draw_names.public_names(SOURCE)) == [
        "function shown(a, b, c)",
        "class Shown",
        "method Shown.method(a)",
        "property Shown.width",
        "method Shown.build(a)",
    ]


def test_a_seed_draws_the_same_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_names.py", "7"])
    outputs = []
    for _ in range(2):
        draw_names.main()
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    first, *names = outputs[0].splitlines()
    assert first.startswith("seed 7, 40 of ")
    assert len(set(names)) == 40
