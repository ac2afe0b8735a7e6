"""`shoestring simulate` as a command, and refusals."""

import json
import re
from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.launch.planner.plan_file import PLAN_FORMAT
from shoestring.launch.verbs.simulate import simulate, simulation_answer
from shoestring.tests.launch.command_line import answer, tree_of
from shoestring.tests.launch.renderings import check_renderings
from shoestring.trainer.ledger.terms import STEP_TIME_TERMS, to_label
from shoestring.trainer.memory.chunk import MemoryKind

V3 = "experiment=deepseek_v3_h800"


def test_the_published_ramp_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "simulate", "experiment=deepseek_v3_h800_published", code=2)
    assert "training.rampup_start_batch_size = 3072: in the first step, 3,072 sequences = 24 micro-batches" in said
    assert "dualpipe on 16 ranks needs an even number ≥ 32" in said


@pytest.mark.parametrize(
    ("ramp", "gist"),
    [
        (
            "training.rampup_start_batch_size=4000",
            "in the first step, 4,000 sequences = 31.25 micro-batches; the nearest valid batch is 4096",
        ),
        (
            "training.rampup_batch_size_increment=200",
            "later in the ramp, 4,296 sequences = 33.5625 micro-batches; the nearest valid batch is 4352",
        ),
        (
            "training.rampup_batch_size_increment=128",
            "later in the ramp, 4,224 sequences = 33 micro-batches; .* nearest 32 or 34",
        ),
    ],
)
def test_a_ramp_with_an_illegal_size_is_refused(capsys: pytest.CaptureFixture[str], ramp: str, gist: str) -> None:
    field, _, value = ramp.partition("=")
    (problem,) = answer(capsys, "train", V3, ramp, code=2).splitlines()[1:]
    assert re.fullmatch(rf"  {re.escape(field)} = {value}: {gist}", problem), problem


def test_half_a_ramp_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "training.rampup_tokens = 0: must be set together with rampup_start_batch_size" in answer(
        capsys, "simulate", V3, "training.rampup_tokens=0", code=2
    )


def test_a_step_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = answer(capsys, "simulate", V3)
    for name in (*STEP_TIME_TERMS, *MemoryKind):
        assert name == to_label(name) or name not in said
    labels = [line.split("│")[1].strip() for line in said.splitlines() if line.count("│") >= 3]
    for label in ("1F", "bubble", "1B", "opt"):
        assert labels.count(label) == 1
    for text in (
        "all-to-all not overlapped",
        "gradient-sync wait",
        "pipeline wait from imbalance",
        "delayed wgrad",
        "P2P messages",
        "exchange buffers",
        "workspace",
        "two_hop (dispatch fp8, combine bf16, combine_backward fp8, dispatch_backward bf16)",
        "250.4 G",
        "+ both = forecast",
        "what-if:",
        "24 micro-batches",
        "without a measured row",
        "fits",
    ):
        assert text in said


def test_json_trace_and_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    found = tree_of(capsys, "simulate", V3, "--trace", str(trace), "--html", str(page), "precision=bf16")
    assert found["layout"]["precision"] == "bf16"
    assert (found["format"], found["version"]) == (PLAN_FORMAT, __version__)
    kinds = {"weights", "gradients", "optimizer_states", *MemoryKind, "outside_allocator", "total"}
    assert set(found["memory_by_rank"][0]) == kinds
    assert found["published_step_errors"] == []  # DeepSeek's figures are of another run
    assert len(found["time_terms_by_rank"]) == 16
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(16))
    names = {event["name"] for event in events}
    assert {"F", "B", "I", "W", "FB", "pipeline_wait", "attn(F)", "mlp(B)", "dispatch", "optimizer"} <= names
    ends = [(event["ts"] + event["dur"]) / 1e6 for event in events if "dur" in event]
    assert max(ends) == pytest.approx(found["layout"]["step_seconds"], rel=1e-6)
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "rank 15" in text


def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = answer(capsys, "simulate", V3, "--trace", str(tmp_path / "no" / "trace.json"), code=2)
    assert "cannot be written" in said


def test_impossible_assumptions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "simulate", V3, "--comm-sms", "132", "--skew", "-1", code=2)
    assert "--comm-sms = 132" in said
    assert "--skew = -1.0" in said


@pytest.mark.parametrize("verb", ["simulate", "plan"])
def test_nothing_can_be_priced_without_kernel_times(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    said = answer(capsys, verb, "experiment=quickstart", code=2)
    assert "cluster.tables = None" in said
    assert "`shoestring calibrate`" in said


def test_json_and_table_stand_on_the_same_evidence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shares = tree_of(capsys, "simulate", V3)["evidence_shares"]
    words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    assert f"by time of distinct operations: {words}" in answer(capsys, "simulate", V3)


def test_three_renderings_show_the_same_numbers() -> None:
    check_renderings(simulation_answer(simulate([V3], None, {})), smallest_number_of_quantities=90)
