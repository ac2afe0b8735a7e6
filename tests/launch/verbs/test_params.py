"""`shoestring params` gives the figures that the report's shape gives by hand."""

import json

import pytest

from shoestring.launch.cli import main
from shoestring.launch.compose import compose_run_config
from shoestring.tests.launch.command_line import answer, answer_of
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer_folder

# DeepSeek-V3 (report §4.2 and the released configuration).
VOCABULARY, HIDDEN, LAYERS, DENSE_LAYERS = 129_280, 7_168, 61, 3
HEADS, NOPE, ROPE, VALUE, QUERY_RANK, KEY_VALUE_RANK = 128, 128, 64, 128, 1_536, 512
DENSE_FFN, EXPERT_FFN, EXPERTS, SHARED, TOP_K = 18_432, 2_048, 256, 1, 8
LENGTH = 4_096

ATTENTION = (
    HIDDEN * QUERY_RANK
    + QUERY_RANK * HEADS * (NOPE + ROPE)
    + HIDDEN * (KEY_VALUE_RANK + ROPE)
    + KEY_VALUE_RANK * HEADS * (NOPE + VALUE)
    + HEADS * VALUE * HIDDEN
)
ATTENTION_NORMS = QUERY_RANK + KEY_VALUE_RANK
EXPERT = 3 * HIDDEN * EXPERT_FFN
ROUTER = EXPERTS * HIDDEN
MOE_LAYERS = LAYERS - DENSE_LAYERS
EMBEDDING = VOCABULARY * HIDDEN  # and the head as many
# The weights that one token is multiplied by, without embedding and head.
MAIN_MET = (
    LAYERS * ATTENTION + DENSE_LAYERS * 3 * HIDDEN * DENSE_FFN + MOE_LAYERS * ((SHARED + TOP_K) * EXPERT + ROUTER)
)
MTP_MET = 2 * HIDDEN * HIDDEN + ATTENTION + (SHARED + TOP_K) * EXPERT + ROUTER
MAIN_NORMS = LAYERS * (ATTENTION_NORMS + 2 * HIDDEN) + HIDDEN
MTP_NORMS = ATTENTION_NORMS + 2 * HIDDEN + 3 * HIDDEN
# Multiply-adds of a token with the positions before it: half the sequence on average, query-key and value products.
ATTENDED = HEADS * (NOPE + ROPE + VALUE) * LENGTH / 2
FORWARD_AND_BACKWARD = 3 * 2  # forward, and backward which costs twice as much; 2 FLOPs a multiply-add


def params(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return answer(capsys, "params", *arguments)


def test_deepseek_v3_has_the_published_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = json.loads(params(capsys, "model=deepseek_v3", "--format", "json"))["parameters"]
    idle = (EXPERTS - TOP_K) * EXPERT  # of one layer's experts, for one token
    active = MAIN_MET + MAIN_NORMS + 2 * EMBEDDING
    assert parameters == {
        "main": active + MOE_LAYERS * idle,
        "main_active": active,
        "mtp": MTP_MET + MTP_NORMS + idle,
        "mtp_active": MTP_MET + MTP_NORMS,
        "embedding": EMBEDDING,
        "head": EMBEDDING,
        "routed_experts": MOE_LAYERS * EXPERTS * EXPERT,
        "routed_experts_active": MOE_LAYERS * TOP_K * EXPERT,
    }
    assert (parameters["main"], parameters["main_active"]) == (671_026_404_352, 37_552_282_624)
    assert parameters["mtp"] == 11_610_067_968


def test_deepseek_v3_costs_the_published_flops(capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads(params(capsys, "model=deepseek_v3", "--format", "json"))
    flops = tree["flops_per_token"]
    main_by_hand = FORWARD_AND_BACKWARD * (MAIN_MET + EMBEDDING + LAYERS * ATTENDED)
    mtp_by_hand = FORWARD_AND_BACKWARD * (MTP_MET + EMBEDDING + ATTENDED)
    whole_attention = FORWARD_AND_BACKWARD * LAYERS * ATTENDED
    assert tree["sequence_length"] == LENGTH
    assert flops == {
        "main": pytest.approx(main_by_hand, rel=1e-12),
        "with_mtp": pytest.approx(main_by_hand + mtp_by_hand, rel=1e-12),
        "main_full_attention": pytest.approx(main_by_hand + whole_attention, rel=1e-12),
    }
    assert flops["main"] == pytest.approx(250.4e9, rel=5e-4)
    assert flops["with_mtp"] == pytest.approx(260.6e9, rel=5e-4)


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = params(capsys, "model=deepseek_v3")
    for figure in ("671.03 B", "37.55 B", "11.61 B", "926.68 M", "250.4", "260.6", "4096", "causal attention"):
        assert figure in text


def test_the_reports_policy_halves_what_a_routed_layer_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("model=deepseek_v3", "recompute=deepseek_v3", "--format", "json")
    kept = json.loads(params(capsys, *arguments))["activation_bytes"]["routed"]
    # An independent tool (ModelZoo's) has 2,236 MB, and 1,020 MB after such savings; one of these is always on
    # here: experts multiply by gates before their down projection.
    assert kept["with_recompute"] == pytest.approx(1020 * 2**20, rel=0.03)
    assert kept["no_recompute"] - kept["with_recompute"] == 2**20 * 1024
    text = params(capsys, *arguments[:2])
    assert "1,000.6" in text
    assert "norm, swiglu, up_projection" in text
    assert "without" not in params(capsys, "model=deepseek_v3").partition("Activations")[2]


def test_a_model_without_mtp_has_no_row_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    text = params(capsys, "model=v2_lite_16b")
    assert "MTP" not in text
    assert "15.71 B" in text  # 15.7 B in DeepSeek-V2's report


def test_the_length_is_the_published_one_unless_a_run_gives_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def length(*overrides: str) -> int:
        return int(json.loads(params(capsys, *overrides, "--format", "json"))["sequence_length"])

    assert length("model=tiny") == LENGTH
    assert length("model=tiny", "training.sequence_length=64") == 64
    assert length("experiment=quickstart") == compose_run_config(["experiment=quickstart"]).training.sequence_length
    assert length("experiment=quickstart", "training.sequence_length=64") == 64


def test_refused_input_exits_with_2_and_a_line_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["params", "model=huge", "trainin.seed=1"])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    first, *others = output.err.splitlines()
    assert first == "shoestring params: error"
    assert [line.split(" = ")[0].strip() for line in others] == ["model", "trainin"]


def test_a_model_need_not_fit_the_default_data(capsys: pytest.CaptureFixture[str]) -> None:
    def embedding(*overrides: str) -> int:
        return int(json.loads(params(capsys, *overrides, "--format", "json"))["parameters"]["embedding"])

    assert embedding("model.vocab_size=1000") == 128 * 1000
    assert embedding("experiment=quickstart", "model.vocab_size=1000") == 128 * 1000
    tokenizer = [f"data.tokenizer={deepseek_tokenizer_folder()}", "data.vocab_size=null", "data.fim_rate=0.1"]
    assert embedding(*tokenizer, "model.vocab_size=null") == 128 * 129280
    assert embedding("data.tokenizer=nowhere", "data.vocab_size=null") == 128 * 2048


def test_three_renderings_show_the_same_numbers() -> None:
    figures = answer_of("params", "model=deepseek_v3", "recompute=deepseek_v3")
    check_renderings(figures, smallest_number_of_quantities=14)
