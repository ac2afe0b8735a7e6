"""Words that cannot be shown throw no work away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.tests.launch.small_run import SMALL

SAY = "from shoestring.launch.say import tell; tell('one'); tell('two'); tell('three'); open({done!r}, 'w')"
CLOSED = {
    "a pipe that nobody reads": "{command} | true; exit ${{PIPESTATUS[0]}}",
    "a full disk": "{command} > /dev/full",
    "closed": "{command} >&-",
    "closed, and standard error too": "{command} >&- 2>&-",
    "closed, all three": "{command} <&- >&- 2>&-",
    "a file that may not grow": "ulimit -f 0; {command} > out",
    "a pipe whose reader leaves later": "{command} | head -n 1; exit ${{PIPESTATUS[0]}}",
}


def bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("how", CLOSED)
def test_a_program_whose_words_go_nowhere_ends_as_it_should(how: str, tmp_path: Path) -> None:
    done = str(tmp_path / "done")
    command = f'{sys.executable} -c "{SAY.format(done=done)}"'
    ended = bash(CLOSED[how].format(command=command), tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert Path(done).exists()


def test_a_preparation_outlives_its_terminal(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(" ".join(f"word{index * 7919 % 211}" for index in range(2000)))
    (tmp_path / "corpus" / "v.txt").write_text("To talk of many things. " * 40)
    data = ["data.corpus=corpus", "'data.validation=[v]'", "data.vocabulary=300", "model.vocabulary=300"]
    command = " ".join([sys.executable, "-m", "shoestring.launch.cli", "data", "prepare", *SMALL[:1], *data])
    for name, view in (("pipe", "| head -n 1"), ("full", "> /dev/full")):
        ended = bash(f"{command} data.prepared={name} {view}; exit ${{PIPESTATUS[0]}}", tmp_path)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert (tmp_path / name / "manifest.json").exists()
