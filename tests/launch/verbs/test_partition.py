"""`shoestring partition`: DeepSeek-V3 on sixteen stages, and refusals."""

from typing import Any

import pytest

from shoestring.tests.launch.command_line import answer, answer_of, tree_of
from shoestring.tests.launch.renderings import check_renderings

EMBEDDING = 129_280 * 7_168


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    return answer(capsys, "partition", *arguments, code=code)


def tree(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return tree_of(capsys, "partition", *arguments)


def test_deepseek_v3_on_sixteen_stages(capsys: pytest.CaptureFixture[str]) -> None:
    split = tree(capsys, "model=deepseek_v3", "--stages", "16")
    stages = split["stages"]
    assert split["layout"] == [4] * 15 + [1]
    assert split["imbalance"] == pytest.approx(0.213, abs=0.001)
    assert [layer for stage in stages for layer in stage["layers"]] == list(range(61))
    assert sum(stage["flops_per_token"] for stage in stages) == pytest.approx(260.6e9, rel=5e-4)
    # The main model, the MTP module, and the embedding that the last stage needs for it.
    assert sum(stage["parameters"] for stage in stages) == 671_026_404_352 + 11_610_067_968 + EMBEDDING
    assert [stage["non_layer_modules"] for stage in (stages[0], stages[1], stages[15])] == [
        ["embedding"],
        [],
        ["head", "MTP", "embedding replica"],
    ]


@pytest.mark.parametrize(("schedule", "last"), [("dualpipe", [0, 15]), ("dualpipev", [0])])
def test_no_replica_where_first_and_last_stage_share_a_rank(
    capsys: pytest.CaptureFixture[str], schedule: str, last: list[int]
) -> None:
    split = tree(capsys, "model=deepseek_v3", "--stages", "16", "--schedule", schedule)
    assert sum(stage["parameters"] for stage in split["stages"]) == 671_026_404_352 + 11_610_067_968
    assert split["stages"][-1]["ranks"] == last
    assert split["stages"][-1]["non_layer_modules"] == ["head", "MTP"]


def test_a_model_without_mtp_needs_no_replica(capsys: pytest.CaptureFixture[str]) -> None:
    stages = tree(capsys, "model=v2_lite_16b", "--stages", "4")["stages"]
    assert stages[-1]["non_layer_modules"] == ["head"]


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    text = run(capsys, "model=deepseek_v3", "--stages", "16")
    for figure in (
        "3 dense, 1 MoE, embedding",
        "46.029 B",
        "24.971 B",
        "121.3",
        "21.3 % above the mean",
        "Layers per stage: 4,4",
    ):
        assert figure in text


def test_a_layout_is_taken_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    layout = [1, 2, 1]
    split = tree(capsys, "model=tiny", "--stages", "3", "--layers-per-stage", ",".join(map(str, layout)))
    assert split["layout"] == layout
    assert [stage["layers"] for stage in split["stages"]] == [[0], [1, 2], [3]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stages", "5"), "--stages = 5: must be from 1 to 4"),
        (("--stages", "3", "--layers-per-stage", "1,2"), "--layers-per-stage = '1,2': has 2 stages"),
        (("--stages", "3", "--layers-per-stage", "1,x,2"), "must be the number of layers of each stage"),
        (("--stages", "3", "--schedule", "dualpipev"), "--stages = 3: dualpipev has 2 stages per rank: nearest 2 or 4"),
        (("--stages", "3", "--schedule", "zigzag"), "--schedule = 'zigzag': unknown; must be one of"),
    ],
)
def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    assert words in run(capsys, "model=tiny", *arguments, code=2)


def test_three_renderings_show_the_same_numbers() -> None:
    split = answer_of("partition", "model=deepseek_v3", "--stages", "16")
    check_renderings(split, smallest_number_of_quantities=48)
