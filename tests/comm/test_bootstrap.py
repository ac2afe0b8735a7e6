"""The environment variables of a rank: each invalid one is refused by name."""

import pytest

from shoestring.comm.bootstrap import TorchrunEnvironment
from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.rank_variables import in_torchrun


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("abc", "", "-1", "2", "1e0", "\u0661")),
        *(("WORLD_SIZE", value) for value in ("0", "two")),
        ("LOCAL_RANK", "x"),
        *(("LOCAL_WORLD_SIZE", value) for value in ("x", "0", "")),
        *(("MASTER_PORT", value) for value in ("0", "http", "99999999999999999999")),
        ("MASTER_ADDR", ""),
    ],
)
def test_variables_of_ranks_that_mean_nothing_are_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_torchrun(monkeypatch, **({"RANK": "0", "WORLD_SIZE": "2"} | {name: value}))
    with pytest.raises(ConfigError) as refused:
        TorchrunEnvironment.read()
    assert [problem.field for problem in refused.value.problems] == [name]


def test_half_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        TorchrunEnvironment.read()
