"""`shoestring rehearse` as a command: refusals and its result."""

import json

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.cli import main
from shoestring.launch.rehearsal.device.shim import build_autograd_shim
from shoestring.tests.launch.rehearsal.small_grid import SMALL


@pytest.fixture(scope="module", autouse=True)
def _shim() -> None:
    """Skip where the shim cannot be built."""
    try:
        build_autograd_shim()
    except ConfigError as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "0,4"), "--ranks = 4: the run has 4 ranks; write numbers from 0 to 3"),
        (("--micro-batches", "0"), "--micro-batches = 0: 1f1b on 2 ranks needs at least 1"),
        (
            ("schedule=dualpipev", "training.global_batch_size=8", "--micro-batches", "3"),
            "--micro-batches = 3: dualpipev on 2 ranks needs",
        ),
        (("--top-operations", "-1"), "--top-operations = -1: must be at least 0"),
        (("model.hiden=3",), "model.hiden = 3: no such key; did you mean hidden_size?"),
        (("exchange=deepep",), "exchange.name = 'deepep': cannot be rehearsed"),
    ],
)
def test_refusals(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["rehearse", *SMALL, *arguments])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert said in output.err
    assert not output.out


def test_the_command_prints_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["rehearse", *SMALL, "--ranks", "3", "--micro-batches", "4", "--format", "json"])
    output = capsys.readouterr()
    tree = json.loads(output.out)
    assert stopped.value.code == 0
    assert tree["findings"] == []
    assert [rank["micro_batches"] for rank in tree["ranks"]] == [4]
    assert output.err.splitlines()[:2] == ["reading the configuration", "rehearsing 1 rank(s), 1 at a time"]
