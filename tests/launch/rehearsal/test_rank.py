"""A rank of a tiny model on a device that computes nothing: each log is made by a process, as `rehearse` makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from shoestring.comm.communicator import Collectives
from shoestring.comm.errors import ConfigError
from shoestring.comm.groups import ProcessGroups
from shoestring.launch.compose import compose_run
from shoestring.launch.rehearsal.configured import on_gpu
from shoestring.launch.rehearsal.device.shim import build_shim
from shoestring.launch.rehearsal.log import Collective, HostWait, MessageBatch, RankLog, Record, StreamWait
from shoestring.trainer.build import stages_of
from shoestring.trainer.config import RunConfig
from shoestring.trainer.memory.forecast import MARGIN, RunMemory
from shoestring.trainer.run.step import HOST_READS_A_STEP

FP8 = ("topology.pp=2", "topology.ep=4", "topology.gpus_per_node=2", "exchange=two_hop_fp8", "precision=fp8")
BF16 = ("topology=pp2_ep2", "exchange=flat", "precision=bf16", "schedule=dualpipe")
FP8_RANK, BF16_RANK = 1, 3
MICRO_BATCHES = 4


def rehearse(
    shim: Path,
    scratch: Path,
    overrides: Sequence[str],
    rank: int,
    *,
    micro_batches: int | None = None,
    faults: str = "",
) -> RankLog:
    spec, out = scratch / "spec.json", scratch / "out.json"
    described = {
        "overrides": list(overrides),
        "config_dir": None,
        "rank": rank,
        "micro_batches": micro_batches,
        "shim": str(shim),
    }
    spec.write_text(json.dumps(described))
    module = "shoestring.tests.launch.rehearsal.seeded_rank" if faults else "shoestring.launch.rehearsal.rank"
    command = [sys.executable, "-m", module, str(spec), str(out), *([faults] if faults else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return RankLog.read(out)


@pytest.fixture(scope="module")
def in_fp8(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> RankLog:
    pytest.importorskip("triton")
    return rehearse(shim, tmp_path_factory.mktemp("fp8"), FP8, FP8_RANK, micro_batches=MICRO_BATCHES)


@pytest.fixture(scope="module")
def in_bf16(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> RankLog:
    return rehearse(shim, tmp_path_factory.mktemp("bf16"), BF16, BF16_RANK)


@pytest.fixture(params=["in_fp8", "in_bf16"])
def log(request: pytest.FixtureRequest) -> RankLog:
    found: RankLog = request.getfixturevalue(request.param)
    return found


def config_of(log: RankLog) -> RunConfig:
    if log.rank == BF16_RANK:
        return compose_run(BF16)
    return compose_run([*FP8, f"training.global_batch={4 * MICRO_BATCHES}"])


def test_a_whole_step_runs_without_a_finding(log: RankLog) -> None:
    assert log.findings == ()
    assert log.micro_batches == MICRO_BATCHES if log.rank == FP8_RANK else config_of(log).micro_batches
    assert {row.phase for row in log.launches} >= {"attn(F)", "mlp(B)", "dispatch", "combine_backward", "optimizer"}
    assert log.operations > sum(row.launches for row in log.launches) > 1000
    assert any("balanced" in each for each in log.assumptions)


def test_memory_is_what_is_predicted(log: RankLog) -> None:
    config, live = config_of(log), log.memory
    memory = RunMemory(config, torch.device("cuda"))
    predicted = memory.of(log.pp_rank)
    chunks = stages_of(config).chunks(log.pp_rank)
    layers = [layer for chunk in chunks for layer in chunk.layers]
    routers = sum(layer >= config.model.first_k_dense_replace for layer in layers) + any(c.is_last for c in chunks)
    biases = 4 * config.model.n_routed_experts * routers  # of routers, which the prediction leaves out
    # Angles of positions, which a chunk keeps from its first forward on: complex64.
    angles = 8 * len(chunks) * config.training.sequence_length * config.model.qk_rope_head_dim // 2
    beyond = live.state - (predicted.state.total - predicted.state.fp8_weights) - biases - angles
    assert 0 <= beyond <= 16  # what the lanes connected with: messages of one element
    assert live.predicted == predicted.allocated
    assert abs(live.peak / live.predicted - 1) < MARGIN
    assert live.building >= live.state
    assert live.by_phase[live.peak_phase] == live.peak == max(live.by_phase.values())


def test_the_host_waits_for_sizes_and_for_the_sums_of_the_step(log: RankLog) -> None:
    waits = [event for event in log.events if isinstance(event, HostWait) and not event.is_warm_up]
    collectives = [event for event in log.events if isinstance(event, Collective) and not event.is_warm_up]
    sizes = [event for event in collectives if event.what.startswith("sizes of")]
    assert sizes
    assert Counter(wait.reason for wait in waits) == {"read": HOST_READS_A_STEP, "event": len(sizes)}
    assert {wait.reason for wait in waits if wait.is_inside_pair} <= {"event"}
    assert any(wait.is_inside_pair for wait in waits) == (log.rank == BF16_RANK)  # DualPipe alone has FBs
    assert all("comm/" in wait.place and "micro-batch" in wait.place for wait in waits if wait.reason == "event")


def test_events_are_recorded_before_they_are_waited_for(log: RankLog) -> None:
    recorded = set()
    for event in log.events:
        if isinstance(event, Record):
            recorded.add(event.event)
        elif isinstance(event, StreamWait):
            assert event.event in recorded
    streams = {event.stream for event in log.events}
    assert streams == {"compute", "exchange", "edge up", "edge down", "reduce"}


def test_communication_says_what_with_whom_and_how_much(log: RankLog) -> None:
    config = config_of(log)
    collectives = [event for event in log.events if isinstance(event, Collective) and not event.is_warm_up]
    assert {each.group for each in collectives} >= {"world", "ep", "dense gradients"}
    assert Counter(each.group for each in collectives)["world"] == 2
    for each in collectives:
        assert log.rank in each.ranks
        if each.operation == "all_to_all":
            assert len(each.sends) == len(each.receives) == len(each.ranks)
    tokens = config.schedule.micro_batch * config.training.sequence_length
    if log.rank == BF16_RANK:
        copies = [each for each in collectives if each.what.startswith("dispatch of")]
        assert all(
            sum(each.sends) == sum(each.receives) == tokens * config.model.num_experts_per_tok for each in copies
        )
    batches = [event for event in log.events if isinstance(event, MessageBatch) and not event.is_warm_up]
    messages = [message for batch in batches for message in (*batch.sends, *batch.receives)]
    assert {message.shape for message in messages} == {(1, config.training.sequence_length, config.model.hidden_size)}
    assert {message.dtype for message in messages} == {"bfloat16"}
    assert {message.peer for message in messages} == {(log.rank + config.topology.dp) % log.world_size}
    assert all(" of micro-batch " in message.what and ";" not in message.what for message in messages)


class Counting:
    """Makes no group: counts the calls."""

    calls = 1

    def world(self, ranks: tuple[int, ...]) -> Collectives:
        self.calls += 1
        return None  # type: ignore[return-value]

    def control(self, ranks: tuple[int, ...]) -> Collectives:
        self.calls += 1
        return None  # type: ignore[return-value]

    def split(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        self.calls += 1
        return None


def test_a_split_is_one_creation_of_groups(log: RankLog) -> None:
    config, counting = config_of(log), Counting()
    holders = stages_of(config).all_holders()
    ProcessGroups.create(config.topology, log.rank, timedelta(seconds=1), holders, counting)
    assert log.group_creations == counting.calls
    assert 5 < log.group_creations <= 20


def test_kernels_of_triton_are_counted_by_their_tensors(in_fp8: RankLog) -> None:
    config = config_of(in_fp8)
    rows = [row for row in in_fp8.launches if row.operation == "triton.multiply" and row.phase == "mlp(F)"]
    assert {row.layer for row in rows} == {"layer_01", "layer_02"}
    assert {row.place for row in rows} == {"trainer/precision/triton_backend.py:TritonBackend.multiply_grouped"}
    micro_batches = 2 * in_fp8.micro_batches  # of two layers
    assert sum(row.launches for row in rows) == 4 * micro_batches  # shared and routed experts, two products each
    read = (
        config.model.hidden_size * config.training.sequence_length * config.model.num_experts_per_tok
    )  # FP8 rows for the experts
    assert sum(row.bytes for row in rows) > 2 * micro_batches * read


def test_faults_are_named_with_their_place(shim: Path, tmp_path: Path) -> None:
    log = rehearse(shim, tmp_path, BF16, BF16_RANK, faults="host tensor,host read,deprecated")
    found = {finding.kind: finding for finding in reversed(log.findings)}
    assert set(found) == {"device", "host read", "deprecated"}
    assert "bfloat16 tensor [128] of the host" in found["device"].text
    assert found["host read"].place.startswith("FB ")
    assert "merging is deprecated" in found["deprecated"].text
    assert all("trainer/model/chunk.py:" in finding.place for finding in log.findings)
    assert any(wait.reason == "read" and wait.is_inside_pair for wait in log.events if isinstance(wait, HostWait))


def test_an_error_ends_the_step_and_the_log_is_written(shim: Path, tmp_path: Path) -> None:
    log = rehearse(shim, tmp_path, BF16, BF16_RANK, faults="shape")
    (finding,) = log.findings
    assert finding.kind == "error"
    assert "shape '[7, -1]' is invalid" in finding.text
    assert finding.place.startswith("building: ")  # before the step each chunk runs once by itself
    assert "trainer/model/chunk.py:" in finding.place
    assert log.events
    assert log.launches


def test_what_cannot_be_rehearsed_is_refused() -> None:
    deepep = compose_run(["exchange=deepep", "topology=pp2_ep2"])
    with pytest.raises(ConfigError, match=r"exchange\.name = 'deepep': cannot be rehearsed"):
        on_gpu(deepep, None)
    with pytest.raises(ConfigError, match=r"training\.global_batch = 6"):
        on_gpu(compose_run(BF16), 3)  # DualPipe of two ranks wants an even number
    with pytest.raises(ConfigError, match=r"precision\.compute = 'float32': cannot be rehearsed"):
        on_gpu(compose_run(["precision=fp32"]), None)


def test_a_run_is_taken_to_its_gpus() -> None:
    config = on_gpu(compose_run(FP8), 5)
    assert (config.training.device, config.training.attention, config.precision.provider) == ("cuda", "cudnn", "triton")
    assert config.micro_batches == 5


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"install g\+\+"):
        build_shim()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ConfigError, match="could not compile"):
        build_shim()
    assert not list(tmp_path.rglob("*.so"))


def test_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(ConfigError, match=r"torch = '2\.12\.1\+cpu'"):
        build_shim()
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match="was built for GPUs"):
        build_shim()
