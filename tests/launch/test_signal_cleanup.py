"""`data prepare`, `import` and `export` at a signal, and after an earlier one was killed."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoestring.comm.errors import ConfigError
from shoestring.launch.signal_cleanup import clean_up_on_signal
from shoestring.launch.verbs import data_prepare, export_weights, import_weights
from shoestring.tests.launch.command_line import run_verb
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.trainer.checkpoint.saved import save_params
from shoestring.trainer.data.unfinished_directory import lock_directory

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    config = reference_configs()["full"]
    save_params(config, random_params(config, 3, torch.float32), root)
    return root


def export_to(store: Path, directory: Path) -> int:
    return run_verb("export", store, directory)


def prepare(root: Path) -> int:
    (corpus := root / "corpus").mkdir()
    for name in ("alpha", "held"):
        (corpus / f"{name}.txt").write_text("The owl and the pussycat went to sea in a beautiful pea-green boat. " * 20)
    sizes = ("data.vocab_size=300", "model.vocab_size=300", "data.validation=[held]")
    return run_verb("data", "prepare", f"data.corpus={corpus}", f"data.prepared={root}/made/data", *sizes)


def killing(number: signal.Signals, words: str) -> Callable[[str], None]:
    """Return a stand-in for `tell` that sends a signal, and a second one, when `words` are printed."""

    def tell(line: str) -> None:
        if re.search(words, line):
            os.kill(os.getpid(), number)
            raise AssertionError("the signal did not raise")

    return tell


def ended_by(number: signal.Signals, call: Callable[[], object]) -> None:
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            call()
        return
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_nothing_half_made(
    number: signal.Signals,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export_to(store, tmp_path / "released")
    before = signal.getsignal(number)
    for verb in (export_weights, import_weights):
        monkeypatch.setattr(verb, "print_to_stdout", killing(number, "tensors|up to"))
    monkeypatch.setattr(data_prepare, "print_to_stdout", killing(number, "held out"))
    ended_by(number, lambda: export_to(store, tmp_path / "out"))
    ended_by(number, lambda: run_verb("import", tmp_path / "released", tmp_path / "imported"))
    assert [path.name for path in tmp_path.iterdir()] == ["released"]
    ended_by(number, lambda: prepare(tmp_path))
    assert not (tmp_path / "made" / "data" / "manifest.json").exists()
    assert signal.getsignal(number) == before
    if number != signal.SIGINT:
        removed = "unfinished output was removed"
        ends = {"export": removed, "import": removed, "data prepare": "the same command continues"}
        words = "".join(f"shoestring {verb}: stopped by {number.name}; {end}\n" for verb, end in ends.items())
        assert capsys.readouterr().err == words


def test_a_second_signal_does_not_cut_the_cleaning_short(tmp_path: Path) -> None:
    (tmp_path / "half").touch()

    def make() -> None:
        with clean_up_on_signal("make"):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
                (tmp_path / "half").unlink()

    ended_by(signal.SIGTERM, make)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_or_import_has_left_is_removed_with_a_message(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / ".out.exporting-7-ab"
    partial = tmp_path / "imported" / "step_00000000.partial"
    for each in (left, partial):
        each.mkdir(parents=True)
        with lock_directory(each):
            (each / "half").touch()
    export_to(store, tmp_path / "out")
    with lock_directory(partial), pytest.raises(ConfigError, match="another import is writing it"):
        run_verb("import", tmp_path / "out", tmp_path / "imported")
    run_verb("import", tmp_path / "out", tmp_path / "imported")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "imported"}
    words = capsys.readouterr().out
    for each in (left, partial):
        assert f"{each} was left by a process that was killed; it is removed." in words
    for made in (tmp_path / "out", tmp_path / "imported" / "step_00000000"):
        assert not (made / ".lock").exists()
