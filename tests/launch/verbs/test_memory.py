"""`shoestring memory`: predictions, measurements and refusals."""

import pytest
import torch

from shoestring.comm.exchange.deepep_buffer import DeepEPBufferShape, deepep_buffer_bytes
from shoestring.launch.compose import compose_run_config
from shoestring.launch.planner.layout_memory import memory_by_kind
from shoestring.launch.verbs.memory import memory_answer
from shoestring.launch.verbs.simulate import simulate
from shoestring.tests.launch.command_line import answer
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.launch.verbs.memory_command import SMALL, tree
from shoestring.trainer.memory.forecast import MemoryPredictor
from shoestring.trainer.memory.measured import MeasuredMemory

DEEPSEEK = ["experiment=deepseek_v3_h800", "precision=fp8", "recompute=deepseek_v3"]


def memory(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    return answer(capsys, "memory", *arguments, code=code)


def test_bytes_a_parameter_are_those_of_zero_1(capsys: pytest.CaptureFixture[str]) -> None:
    """2 for the weight, 4 for the gradient, 4 / d for the master, 4 / d for both moments."""
    arguments = (*SMALL, "topology.edp=2", "precision=bf16", "optimizer.ema_decay=0.9")
    (rank,) = tree(capsys, *arguments)["predicted"]
    state = rank["state"]
    assert state["gradients"] == pytest.approx(2 * state["weights"], rel=0.02)  # norms and routers are FP32
    assert state["masters"] == pytest.approx(state["gradients"] / 2, rel=0.02)
    assert state["moments"] == pytest.approx(state["masters"], rel=0.02)
    assert state["average"] == pytest.approx(state["masters"], rel=0.02)
    assert rank["total"] == sum(state.values()) + sum(rank["peak"].values())


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    arguments = (*SMALL, "topology.pp=2", "topology.ep=2")
    figures, text = tree(capsys, *arguments), memory(capsys, *arguments)
    for rank, bound in zip(figures["predicted"], figures["worst_case_routing_bytes"], strict=True):
        assert f"{rank['total'] / 1e6:,.2f}" in text
        assert f"{bound / 1e6:,.2f}" in text
    assert "on a CPU" in text


@pytest.mark.parametrize(
    "layout", ["exchange=two_hop_fp8", "exchange=deepep", "exchange=two_hop schedule=1f1b precision=bf16"]
)
def test_deepseeks_layout_is_what_the_planner_says(layout: str) -> None:
    overrides = [*DEEPSEEK, *layout.split()]
    run = MemoryPredictor(compose_run_config(overrides), torch.device("cuda"))
    forecast = simulate(overrides, None, {}).forecast
    for pp_rank in (0, 1, 7, 15):
        ours, planned = run.predict_rank(pp_rank), forecast.memory_by_rank[pp_rank]
        assert memory_by_kind(ours) == memory_by_kind(planned)  # to the byte
        assert ours.total == planned.total


def test_deepeps_buffer_is_counted_by_its_own_formula(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.88 GB for DeepSeek-V3, where NCCL's all-to-alls are assumed to take 1 GB; none on a CPU."""
    monkeypatch.setenv("COLUMNS", "300")
    buffer = deepep_buffer_bytes(DeepEPBufferShape(4096, 7168, 8), 8, 8, fp8_dispatch=True)
    rank = tree(capsys, *DEEPSEEK, "exchange=deepep")["predicted"][7]
    assert rank["outside_allocator"] == {"context": 2e9, "exchange": buffer}
    assert rank["total"] == sum(rank["state"].values()) + sum(rank["peak"].values()) + 2e9 + buffer
    (line,) = (
        line
        for line in memory(capsys, *DEEPSEEK, "exchange=deepep").split("\n")
        if "exchange buffers, outside allocator" in line
    )
    assert line.count("4,884.27") == 16
    assert tree(capsys, *DEEPSEEK)["predicted"][7]["outside_allocator"] == {"context": 2e9, "exchange": 1e9}
    on_cpu = tree(capsys, *SMALL, "topology.ep=2")["predicted"][0]
    assert on_cpu["outside_allocator"] == {"context": 0.0, "exchange": 0.0}


def test_rows_in_deepeps_buffer_take_none_of_the_allocators_memory() -> None:
    """Two hops pack, receive and widen rows; DeepEP's kernels read their input and write results."""
    ranks = {}
    for exchange in ("two_hop_fp8", "deepep"):
        run = MemoryPredictor(compose_run_config([*DEEPSEEK, f"exchange={exchange}"]), torch.device("cuda"))
        ranks[exchange] = run.predict_rank(7).allocator_bytes
    assert ranks["two_hop_fp8"] - ranks["deepep"] == pytest.approx(1.4e9, rel=0.05)


def test_the_average_of_the_weights_takes_none_of_a_gpus_memory() -> None:
    """The host holds it; on a CPU that is the same memory."""
    plain, averaging = compose_run_config(SMALL), compose_run_config([*SMALL, "optimizer.ema_decay=0.9"])
    for device in map(torch.device, ("cuda", "cpu")):
        plain_run, averaged = (MemoryPredictor(config, device).predict_rank(0) for config in (plain, averaging))
        expected = 0 if device.type == "cuda" else plain_run.state.gradients  # as wide as these, and one rank has all
        assert averaged.total - plain_run.total == pytest.approx(expected)


def test_what_the_host_of_a_gpu_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """The host holds the average, 64 MiB of staging, and a copy for saves of everything that is stored."""
    plain, averaging = compose_run_config(SMALL), compose_run_config([*SMALL, "optimizer.ema_decay=0.9"])
    for device in map(torch.device, ("cuda", "cpu")):
        plain_run, averaged = (MemoryPredictor(config, device) for config in (plain, averaging))
        masters = plain_run.predict_rank(0).state.gradients  # one rank has all, as wide as these
        copied = masters + plain_run.predict_rank(0).state.moments
        assert (plain_run.predict_host(0).copy_for_saves, plain_run.predict_host(0).average) == (copied, 0)
        assert averaged.predict_host(0).copy_for_saves == copied + masters
        assert averaged.predict_host(0).average == (masters + 2**26 if device.type == "cuda" else 0)
    arguments = (*SMALL, "optimizer.ema_decay=0.9", "training.device=cuda")
    host = tree(capsys, *arguments)["host_bytes"][0]
    text = memory(capsys, *arguments).split("\n")
    for heading, size in (("checkpoint staging", host["copy_for_saves"]), ("EMA", host["average"])):
        assert any(f"host, {heading}" in line and f"{size / 1e6:,.2f}" in line for line in text)


def test_one_rank_is_a_way_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--one-rank = True: needs --measure too" in memory(capsys, *SMALL, "--one-rank", code=2)


def test_rows_that_are_no_whole_tiles_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for rows in (0, 100, 200):
        text = memory(capsys, *SMALL, f"recompute.expert_block_rows={rows}", code=2)
        assert f"recompute.expert_block_rows = {rows}: must be a multiple of 128" in text


@pytest.mark.slow
@pytest.mark.parametrize("routing", [(), ("--one-rank",)], ids=["as it falls", "one rank"])
def test_real_processes_need_what_is_predicted(capsys: pytest.CaptureFixture[str], routing: tuple[str, ...]) -> None:
    figures = tree(capsys, *SMALL, "topology.ep=2", "training.sequence_length=128", "--measure", *routing)
    assert len(figures["measured"]) == 2
    bound = figures["worst_case_routing_bytes"][0]
    assert all(found["total"] <= bound for found in figures["measured"])
    if not routing:
        for found in figures["measured"]:
            assert found["total"] == pytest.approx(figures["predicted"][0]["total"], rel=0.05)


def test_three_renderings_show_the_same_numbers() -> None:
    config = compose_run_config(SMALL)
    predictor = MemoryPredictor(config, torch.device("cpu"))
    rank = predictor.predict_rank(0)
    measured = MeasuredMemory(rank.state, 0.9 * rank.between_instructions, 1.1 * rank.total)
    check_renderings(memory_answer(config, "cpu", [measured]), smallest_number_of_quantities=15)
