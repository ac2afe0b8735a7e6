"""Output that cannot be printed does not fail the work."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.launch.console import print_to_stderr, print_to_stdout
from shoestring.launch.run.run_dir import read_run_status
from shoestring.tests.launch.small_run import SMALL, small_run
from shoestring.tests.launch.two_machines import losses

SAY = "from shoestring.launch.console import print_to_stdout as p; p('one'); p('two'); p('three'); open({done!r}, 'w')"
CLOSED = {
    "a pipe without a reader": "{command} | true; exit ${{PIPESTATUS[0]}}",
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
def test_a_program_without_an_output_ends_normally(how: str, tmp_path: Path) -> None:
    done = str(tmp_path / "done")
    command = f'{sys.executable} -c "{SAY.format(done=done)}"'
    ended = bash(CLOSED[how].format(command=command), tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert Path(done).exists()


def shoestring(*arguments: object) -> str:
    return shlex.join([sys.executable, "-m", "shoestring.launch.cli", *map(str, arguments)])


@pytest.mark.parametrize(
    ("view", "code"),
    [
        ("| true; exit ${PIPESTATUS[0]}", 0),
        (">&-", 0),
        (">&- 2>&-", 0),
        ("> /dev/full", 2),
    ],
)
def test_a_verb_that_only_shows(view: str, code: int, tmp_path: Path) -> None:
    """A closed pipe is no failure: its reader has read enough. A full disk is one."""
    ended = bash(f"{shoestring('params', *SMALL)} {view}", tmp_path)
    assert ended.returncode == code, ended.stderr
    problem = "standard output = None: cannot be written (No space left on device)"
    words = ["shoestring params: error", problem] if code else []
    assert all(word in line for word, line in zip(words, ended.stderr.splitlines(), strict=True))


VIEWS = {"closed": ">&-", "full": "> /dev/full", "pipe": "| true; exit ${PIPESTATUS[0]}", "all": "<&- >&- 2>&-"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps with an output that is closed early."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [*small_run(folder / "data", 2), "telemetry.wandb.mode=disabled"]
    ended = bash(f"{shoestring('train', *overrides, 'training.run_dir=run')} | head -n 1", folder)
    assert ended.stderr == ""
    assert read_run_status(folder / "run") == {"exit_code": 0, "reason": "2 steps done"}
    return folder / "run"


@pytest.mark.parametrize("how", [pytest.param(how, marks=[] if how == "full" else pytest.mark.slow) for how in VIEWS])
def test_files_are_written_even_if_the_output_is_closed(how: str, trained: Path, tmp_path: Path) -> None:
    made: dict[str, list[object]] = {
        "hf/config.json": ["export", trained, "hf"],
        "imported": ["import", "hf", "imported"],
        "report.html": ["report", trained, "--html", "report.html"],
        "drawing": ["schedule", "zb_h1", "--pp", 2, "--micro-batches", 4, "--output", "drawing"],
    }
    if how != "full":
        made["calibration"] = ["calibrate", "--output", "calibration", "--ranks", 1, "--repeats", 1]
    for product, verb in made.items():
        ended = bash(f"{shoestring(*verb)} {VIEWS[how]}", tmp_path)
        assert (ended.returncode, ended.stderr) == (0, ""), product
        assert (tmp_path / product).exists(), product


@pytest.mark.slow
@pytest.mark.parametrize("how", VIEWS)
def test_a_run_continues_without_its_output(how: str, trained: Path, tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path / "data", 2), "telemetry.wandb.mode=disabled", "training.run_dir=run"]
    ended = bash(f"{shoestring('train', *overrides)} {VIEWS[how]}", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert losses(tmp_path / "run") == losses(trained)
    again = bash(f"{shoestring('train', *overrides)} {VIEWS[how]}", tmp_path)  # it is finished, and says so
    assert (again.returncode, again.stderr) == (0, "")


def test_a_preparation_outlives_its_terminal(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(" ".join(f"word{index * 7919 % 211}" for index in range(2000)))
    (tmp_path / "corpus" / "v.txt").write_text("To talk of many things. " * 40)
    data = ["data.corpus=corpus", "'data.validation=[v]'", "data.vocab_size=300", "model.vocab_size=300"]
    command = " ".join([sys.executable, "-m", "shoestring.launch.cli", "data", "prepare", *SMALL[:1], *data])
    for name, view in (("pipe", "| head -n 1"), ("full", "> /dev/full")):
        ended = bash(f"{command} data.prepared={name} {view}; exit ${{PIPESTATUS[0]}}", tmp_path)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert (tmp_path / name / "manifest.json").exists()


def test_names_of_others_do_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_to_stderr("error\n\tnode 1: \x1b[2J\x07\udc80")
    print_to_stdout("imported to \x1b]0;title\x07")
    output, errors = capsys.readouterr()
    assert errors == "error\n\tnode 1: \\x1b[2J\\x07\\udc80\n"
    assert output == "imported to \\x1b]0;title\\x07\n"
