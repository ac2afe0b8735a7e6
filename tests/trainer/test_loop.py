"""The loop with everything that a run wires together: data, order, model, gradients, optimizer, checkpoint, ledger."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import RanksFailed, World, run_processes
from shoestring.trainer.build import open_samples, stages_of
from shoestring.trainer.checkpoint.pieces import Piece
from shoestring.trainer.checkpoint.saver import Saved, Saver
from shoestring.trainer.checkpoint.store import CheckpointExtras
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.prepare import prepare
from shoestring.trainer.data.prepared import open_prepared
from shoestring.trainer.data.samples import SampleOrder, Samples, TokenBatch
from shoestring.trainer.data.shard_files import DataChanged
from shoestring.trainer.ledger.meter import CostMeter
from shoestring.trainer.ledger.summary import summarize
from shoestring.trainer.loop import _insist, train
from shoestring.trainer.memory.forecast import RunMemory
from shoestring.trainer.run.exit import RankFailed, RunFailed, RunHalted
from shoestring.trainer.run.reporter import STALL_SECONDS, UnaccountedGaps
from shoestring.trainer.run.stage_runner import StageRunner
from shoestring.trainer.run.step import Stepper, StepResult
from shoestring.trainer.telemetry.history import read_metrics
from shoestring.trainer.typed import build

STEPS, LENGTH, BATCH = 3, 16, 8


def run_config(root: Path) -> dict[str, Any]:
    """A run small enough for seconds, whose small terms are large enough to be seen."""
    return {
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "vocab_size": 300,
            "initializer_range": 0.1,
            "intermediate_size": 32,
            "moe_intermediate_size": 8,
        },
        "data": {
            "corpus": str(root / "corpus"),
            "prepared": str(root / "prepared"),
            "vocabulary": 300,
            "validation": ["held"],
        },
        "precision": {"compute": "float64"},
        "optimizer": {"peak_learning_rate": 1e-2, "final_learning_rate": 0.0, "warmup_tokens": 2 * LENGTH * BATCH},
        "budget": {"gpu_hours": 1.0},
        "cluster": {"peak_tflops": 1.0},
        "training": {
            "run_dir": str(root / "run"),
            "tokens": STEPS * LENGTH * BATCH,
            "sequence_length": LENGTH,
            "global_batch": BATCH,
            "balance_weight": 0.1,
            "bias_speed": {0: 0.05},
            "sample_tokens": 3,
            "sample_prompt": "word",
        },
        "telemetry": {"log_every": 1, "wandb": {"mode": "disabled"}},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "corpus").mkdir()
    words = [f"word{index * 7919 % 211}" for index in range(2000)]
    (folder / "corpus" / "train.txt").write_text(" ".join(words))
    (folder / "corpus" / "held.txt").write_text(" ".join(words[:90]))
    prepare(build(RunConfig, run_config(folder)).data, lambda _: None)
    return folder


def run_rank(world: World, tree: dict[str, Any]) -> None:
    config = build(RunConfig, tree)
    assert not list(config.problems())
    holders = stages_of(config).all_holders()
    groups = ProcessGroups.create(config.topology, world.rank, timedelta(seconds=30), holders)
    train(config, groups, torch.device("cpu"), attempt="test")


def losses_of(
    root: Path,
    name: str,
    topology: Topology,
    micro_batch: int,
    exchange: str = "flat",
    schedule: str = "one_f_one_b",
    **training: Any,
) -> list[dict[str, Any]]:
    tree = run_config(root) | {"topology": asdict(topology), "schedule": {"micro_batch": micro_batch}}
    tree["exchange"] = {"name": exchange, "check_order": True}
    tree["schedule"] = tree["schedule"] | {"name": schedule}
    tree["training"] = tree["training"] | {"run_dir": str(root / name)} | training
    run_processes(topology.world_size, run_rank, tree)
    return [
        dict(event.values) | {"kind": event.kind}
        for event in read_metrics(root / name / "metrics.jsonl")
        if event.kind in ("step", "evaluation", "sample")
    ]


@pytest.fixture(scope="module")
def alone(root: Path) -> list[dict[str, Any]]:
    return losses_of(root, "alone", Topology(), micro_batch=4)


@pytest.mark.parametrize(
    ("topology", "micro_batch", "exchange", "schedule"),
    [
        (Topology(ep=4), 1, "flat", "one_f_one_b"),
        (Topology(ep=2, edp=2), 2, "flat", "one_f_one_b"),
        (Topology(ep=4, gpus_per_node=2), 1, "two_hop", "dualpipev"),
        (Topology(pp=2, edp=2), 1, "flat", "dualpipe"),
    ],
    ids=["ep4", "ep2edp2", "two nodes", "two pipeline ranks"],
)
def test_every_layout_trains_the_same(
    root: Path, alone: list[dict[str, Any]], topology: Topology, micro_batch: int, exchange: str, schedule: str
) -> None:
    spread = losses_of(root, f"{topology.ep} {exchange} {schedule}", topology, micro_batch, exchange, schedule)
    assert len(alone) == len(spread) == STEPS + 2
    for ours, single in zip(spread, alone, strict=True):
        for key in ("loss", "loss/mtp", "loss/balance", "grad_norm", "bias/max", "bias/min"):
            if key in single:
                assert ours[key] == pytest.approx(single[key], rel=1e-10)
        for key in ("kind", "expert_load/layer_01", "expert_load/mtp_01", "targets", "text", "learning_rate"):
            assert ours.get(key) == single.get(key)


SIZES = [4, 4, 8, 12, 16]
"""Sequences of the steps of `RAMP`: three sizes for 8 samples each, of which the last step of the third has more."""
RAMP: dict[str, Any] = {
    "global_batch": 16,
    "ramp_from": 4,
    "ramp_step": 4,
    "ramp_tokens": 24 * LENGTH,
    "tokens": sum(SIZES) * LENGTH,
}


@pytest.fixture(scope="module")
def growing_alone(root: Path) -> list[dict[str, Any]]:
    return losses_of(root, "growing alone", Topology(), micro_batch=4, **RAMP)


@pytest.mark.parametrize(
    ("topology", "schedule"),
    [(Topology(ep=4), "one_f_one_b"), (Topology(pp=2), "dualpipe"), (Topology(pp=2, ep=2), "zb1p")],
    ids=["ep4", "pp2", "pp2ep2"],
)
def test_every_layout_trains_the_same_while_the_batch_grows(
    root: Path, growing_alone: list[dict[str, Any]], topology: Topology, schedule: str
) -> None:
    name = f"growing {schedule}"
    spread = losses_of(root, name, topology, 1, schedule=schedule, **RAMP)
    assert len(spread) == len(growing_alone) == len(SIZES) + 2
    for ours, single in zip(spread, growing_alone, strict=True):
        for key in ("loss", "loss/mtp", "loss/balance", "grad_norm", "bias/max", "bias/min"):
            if key in single:
                assert ours[key] == pytest.approx(single[key], rel=1e-10)
        for key in ("kind", "expert_load/layer_01", "text", "learning_rate", "tokens"):
            assert ours.get(key) == single.get(key)
    summary = summarize(root / name)
    assert (summary.steps_retained, summary.tokens_retained) == (len(SIZES), sum(SIZES) * LENGTH)


def test_a_growing_batch_is_told_by_its_tokens(root: Path, growing_alone: list[dict[str, Any]]) -> None:
    steps = [values for values in growing_alone if values["kind"] == "step"]
    consumed = [LENGTH * sum(SIZES[:count]) for count in range(1, len(SIZES) + 1)]
    assert [values["tokens"] for values in steps] == consumed
    rate = build(RunConfig, run_config(root)).optimizer.learning_rate
    assert [values["learning_rate"] for values in steps] == [rate(tokens) for tokens in consumed]
    assert len({values["learning_rate"] for values in steps[:-1]}) > 2


def taken_samples(world: World, tree: dict[str, Any]) -> list[int]:
    """Numbers of all samples that training takes, in order."""
    taken: list[int] = []
    batch = Samples.batch

    def record(self: Samples, indices: Sequence[int]) -> TokenBatch:
        taken.extend(indices if self.pad is None else ())
        return batch(self, indices)

    with patch.object(Samples, "batch", record):
        run_rank(world, tree)
    return taken


def test_a_growing_batch_takes_every_sample_once_and_in_order(root: Path) -> None:
    tree = run_config(root) | {"schedule": {"micro_batch": 2}}
    tree["training"] = tree["training"] | RAMP | {"run_dir": str(root / "taken")}
    (taken,) = run_processes(1, taken_samples, tree)
    samples = build_samples(root)
    assert taken == SampleOrder(0, samples).indices(0, sum(SIZES)).tolist()


def build_samples(root: Path) -> int:
    """Of the training split."""
    config = build(RunConfig, run_config(root))
    return len(open_samples(config, open_prepared(config.data))[0])


def test_bytes_of_one_step_are_logged_by_link(root: Path) -> None:
    row, weight, sizes = 16 * 8, 8, 16 * 8  # bytes: FP64 rows and gates, int64 counts of all experts
    for values in losses_of(root, "bytes", Topology(ep=2, gpus_per_node=1), micro_batch=4)[:STEPS]:
        expected = 0
        for layer in ("layer_01", "mtp_01"):
            sent, received = BATCH // 2 * LENGTH * 4, sum(values[f"expert_load/{layer}"][:8])
            expected += sizes + (sent + received) * (2 * row + weight)  # a row each way, forward and backward
        assert values["bytes_sent/loopback"] + values["bytes_sent/infiniband"] == expected
        assert values["bytes_sent/infiniband"] > 0
        assert values["bytes_sent/nvlink"] == 0
        # Half of the dense gradients in FP64, and half of the dense weights. Experts have no replicas here.
        assert values["gradients_sent/infiniband"] == values["weights_sent/infiniband"] > 0
        assert values["gradients_sent/loopback"] == 0
        payload = (values["payload_sent/loopback"], values["payload_sent/infiniband"])
        copies = sum(sum(values[f"expert_load/{layer}"][:8]) for layer in ("layer_01", "mtp_01"))
        assert sum(payload) == 2 * row * (BATCH // 2 * LENGTH * 4 * 2 + copies)


def test_what_the_routing_means_for_the_wires_is_logged(root: Path) -> None:
    """Sixteen experts in four groups, top 4 of at most two groups; two nodes of two ranks, two groups each."""
    for values in losses_of(root, "visits", Topology(ep=4, gpus_per_node=2), micro_batch=2)[:STEPS]:
        nodes, ranks = values["routing/nodes_per_token"], values["routing/ranks_per_token"]
        assert 1 <= nodes <= ranks <= 2  # a group is one rank here
        assert values["routing/experts_per_token_and_node"] == pytest.approx(4 / nodes)
        for layer in ("layer_01", "mtp_01"):
            load = torch.tensor(values[f"expert_load/{layer}"])
            for kind, count in (("ranks", 4), ("nodes", 2)):
                share = load.view(count, -1).sum(dim=1) / load.sum()
                assert values[f"load/{kind}/{layer}/max_violation"] == pytest.approx(float(share.max()) * count - 1)


def test_a_traced_run_leaves_one_timeline_of_all_ranks(root: Path) -> None:
    tree = run_config(root) | {"topology": {"ep": 2}, "schedule": {"name": "dualpipev"}}
    tree["training"] = tree["training"] | {"run_dir": str(root / "traced"), "sample_tokens": 0}
    tree["telemetry"] = tree["telemetry"] | {"trace": True, "trace_steps": 2}
    run_processes(2, run_rank, tree)
    events = json.loads((root / "traced" / "trace" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    optimizer_steps = [event for event in events if event["name"] == "optimizer"]
    assert len(optimizer_steps) == 2 * 2  # steps 2 and 3 of each rank
    assert {"FB", "F", "B", "attn(F)", "mlp(W)", "exposed_exchange"} <= {event["name"] for event in events}
    metrics = read_metrics(root / "traced" / "metrics.jsonl")
    values: list[dict[str, Any]] = [dict(event.values) for event in metrics if event.kind == "trace"]
    first, second = values[0]["trace/FB"]
    assert first > 0
    assert second > 0
    (memory,) = (event for event in metrics if event.kind == "memory")  # of step 2; the next look would be at step 50
    assert memory.step == 2
    now: Any = memory.values["now"]
    assert len(now) == 2
    assert all(1e7 < size < 1e11 for size in now)


def one_rank_raises(world: World, tree: dict[str, Any]) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the stage is broken")

    with patch.object(StageRunner, "forward", broken) if world.rank == 1 else nullcontext():
        run_rank(world, tree)


def test_a_rank_that_raises_says_so_at_once(root: Path) -> None:
    """Though a message that its neighbor will never send is under way, with a limit of 30 seconds."""
    tree = run_config(root) | {"topology": {"pp": 2}, "schedule": {"name": "one_f_one_b"}}
    tree["training"] = tree["training"] | {"run_dir": str(root / "raises")}
    began = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        run_processes(2, one_rank_raises, tree)
    assert time.monotonic() - began < 25
    assert str(failure.value).startswith("rank 1 of 2 failed:")
    assert "ValueError: the stage is broken" in str(failure.value)


def test_the_rate_of_a_step_is_that_of_its_end(alone: list[dict[str, Any]]) -> None:
    rates = [values["learning_rate"] for values in alone if values["kind"] == "step"]
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2])  # a warm-up of two steps, then constant


LOOKS = 4
"""At a stop request in one evaluation of the runs below: its rounds of micro-batches."""


def train_until(world: World, tree: dict[str, Any], looks: int, spent_in_a_step: float) -> tuple[int, str] | None:
    """Train; the last rank alone asks to stop, after so many looks. Exit code and reason of a halt."""
    run_dir, asked = Path(tree["training"]["run_dir"]), iter(range(looks))
    config = build(RunConfig, tree)
    groups = ProcessGroups.create(config.topology, world.rank, timedelta(seconds=30))

    begun = summarize(run_dir).steps_retained if run_dir.exists() else 0
    dist.barrier()  # the first rank to train makes the directory
    step, taken = Stepper.step, list[int]()

    def counted(self: Stepper, *arguments: Any) -> StepResult:
        taken.append(len(taken))
        return step(self, *arguments)

    def spent(meter: CostMeter) -> float:
        return spent_in_a_step * (begun + len(taken))

    with mock.patch.object(CostMeter, "gpu_hours", spent), mock.patch.object(Stepper, "step", counted):
        try:
            stop_asked = (lambda: next(asked, None) is None) if world.rank == world.size - 1 else lambda: False
            train(config, groups, torch.device("cpu"), "test", stop_asked)
        except RunHalted as halted:
            return int(halted.halt), str(halted)
    return None


def on_two_ranks(root: Path, name: str, **training: object) -> dict[str, Any]:
    tree = run_config(root) | {"topology": {"ep": 2}, "schedule": {"micro_batch": 2}}
    tree["training"] = tree["training"] | {"run_dir": str(root / name), "evaluate_every": 1} | training
    return tree


def told(tree: dict[str, Any]) -> list[tuple[str, int, Any]]:
    events = read_metrics(Path(tree["training"]["run_dir"]) / "metrics.jsonl")
    known = [event for event in events if event.kind in ("step", "evaluation", "sample")]
    return [(event.kind, event.step, event.values.get("loss", event.values.get("text"))) for event in known]


def test_one_rank_that_is_asked_halts_all_after_the_same_step_and_nothing_is_lost(root: Path) -> None:
    undisturbed, tree = on_two_ranks(root, "undisturbed"), on_two_ranks(root, "halted", checkpoint_every=0)
    assert run_processes(2, train_until, undisturbed, 100, 0.0) == [None, None]
    reason = "stopped before the first step: it was asked to, and the same command goes on"
    assert run_processes(2, train_until, tree, 0, 0.0) == [(75, reason)] * 2
    reason = "stopped after step 2, which is in a checkpoint: it was asked to, and the same command goes on"
    assert run_processes(2, train_until, tree, 2 + LOOKS, 0.0) == [(75, reason)] * 2
    assert told(tree) == told(undisturbed)[:3]  # the evaluation of step 2 is owed
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    assert told(tree) == told(undisturbed)
    summary = summarize(root / "halted")
    assert summary.steps_retained == STEPS
    assert (summary.rolled_back_ms, summary.running) == (0, False)


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_a_stop_in_an_evaluation_is_served_at_the_next_micro_batch(root: Path, checkpoint_every: int) -> None:
    undisturbed = on_two_ranks(root, f"whole{checkpoint_every}")
    tree = on_two_ranks(root, f"left{checkpoint_every}", checkpoint_every=checkpoint_every)
    assert run_processes(2, train_until, undisturbed, 100, 0.0) == [None, None]
    reason = "after step 2, which is in a checkpoint: it was asked to, and the same command goes on"
    # In the evaluation; before it is made up for; in that again.
    for looks, where in (2 + LOOKS + 1 + 2, "in the evaluation "), (0, ""), (1 + 2, ""):
        halted = run_processes(2, train_until, tree, looks, 0.0)
        assert halted == [(75, f"stopped {where}{reason}")] * 2
        assert told(tree) == told(undisturbed)[:3]
    last = run_processes(2, train_until, tree, 1 + LOOKS + 1 + 2, 0.0)  # in the evaluation of the last step
    assert "in the evaluation after step 3" in str(last)
    text = run_processes(2, train_until, tree, LOOKS + 1, 0.0)  # in the second token of the sample
    assert "in the sample after step 3, which is in a checkpoint" in str(text)
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    assert told(tree) == told(undisturbed)
    assert summarize(Path(tree["training"]["run_dir"])).rolled_back_ms == 0


def test_a_checkpoint_that_is_due_comes_before_the_evaluation_which_is_told_once(root: Path) -> None:
    tree = on_two_ranks(root, "longer", checkpoint_every=1)
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    manifest = json.loads((root / "longer" / "checkpoints" / "step_00000003" / "manifest.json").read_text())
    assert manifest["facts"]["owes_evaluation"]
    tree["training"] = tree["training"] | {"tokens": (STEPS + 1) * LENGTH * BATCH, "sample_tokens": 0}
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    assert [step for kind, step, _ in told(tree) if kind == "evaluation"] == [1, 2, 3, 4]


def test_the_budget_guard_halts_the_run_until_its_budget_is_raised(root: Path) -> None:
    tree = on_two_ranks(root, "guarded", tokens=5 * LENGTH * BATCH, checkpoint_every=0)
    first, other = run_processes(2, train_until, tree, 100, 0.4)
    hint = "the run has used 1.2 GPU-hours and its budget is 1; raise budget.gpu_hours to go on"
    assert first == (3, f"stopped after step 3, which is in a checkpoint: {hint}")
    assert other is not None
    assert other[0] == 3
    before = told(tree)
    assert run_processes(2, train_until, tree, 0, 0.4)[0] == first  # also when it is asked to stop
    assert told(tree) == before
    assert run_processes(2, train_until, tree | {"budget": {"gpu_hours": 2.5}}, 100, 0.4) == [None, None]
    assert [step for kind, step, _ in told(tree) if kind == "step"] == [1, 2, 3, 4, 5]
    summary = summarize(root / "guarded")
    assert summary.buckets["checkpoint_save"] > 0
    assert summary.rolled_back_ms == 0
    assert 0 <= summary.unknown_ms < summary.allocated_ms


def reserved_bytes(world: World, tree: dict[str, Any]) -> list[tuple[str, int]]:
    """What a run asks memory for, and what its saves copy, in that order."""
    found, reserve, begin = list[tuple[str, int]](), Saver.reserve, Saver.begin

    def noted_reserve(self: Saver, pieces: list[Piece]) -> None:
        found.append(("reserve", sum(piece.bytes for piece in pieces)))
        reserve(self, pieces)

    def noted_begin(self: Saver, step: int, pieces: list[Piece], cover: CheckpointExtras) -> None:
        found.append(("begin", sum(piece.bytes for piece in pieces)))
        begin(self, step, pieces, cover)

    with patch.object(Saver, "reserve", noted_reserve), patch.object(Saver, "begin", noted_begin):
        run_rank(world, tree)
    return found


def test_memory_for_saves_is_reserved_once_before_the_first_step(root: Path) -> None:
    tree = run_config(root)
    tree["training"] = tree["training"] | {"run_dir": str(root / "reserved")}
    (found,) = run_processes(1, reserved_bytes, tree)
    (first, size), *saves = found
    assert first == "reserve"
    assert saves
    assert all(save == ("begin", size) for save in saves)
    predicted = RunMemory(build(RunConfig, tree), torch.device("cpu")).on_host(0).copy_for_saves
    random = len(torch.get_rng_state())  # the state of a generator is not counted
    assert predicted == pytest.approx(size - random, rel=0.01)
    assert run_processes(1, reserved_bytes, tree) == [[]]  # a run that has nothing left to do


def resumed_random_state(world: World, tree: dict[str, Any]) -> bool:
    """Train with one state of torch's generator, go on with another; whether the first one is back."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    run_rank(world, tree)
    torch.manual_seed(5)
    run_rank(world, tree)
    return torch.equal(torch.get_rng_state(), before)


def test_the_random_state_comes_back_with_the_checkpoint(root: Path) -> None:
    tree = run_config(root)
    tree["training"] = tree["training"] | {"run_dir": str(root / "random")}
    assert run_processes(1, resumed_random_state, tree) == [True]


def test_shards_of_masters_moments_and_average_come_back_with_the_checkpoint(root: Path) -> None:
    """Two ranks with replicas, weights in BF16: six steps, and three steps twice."""

    def run(name: str, steps: int) -> list[dict[str, Any]]:
        tree = run_config(root) | {"topology": {"edp": 2}, "precision": {"compute": "bfloat16"}}
        tree["optimizer"] = tree["optimizer"] | {"ema_decay": 0.5}
        tokens = {"tokens": steps * LENGTH * BATCH, "run_dir": str(root / name), "evaluate_every": 2}
        tree["training"] = tree["training"] | tokens
        run_processes(2, run_rank, tree)
        kinds, path = ("step", "evaluation", "sample"), root / name / "metrics.jsonl"
        exact = ("loss", "loss/mtp", "grad_norm", "loss/averaged", "text")
        events = [event for event in read_metrics(path) if event.kind in kinds and event.step > 3]
        return [{key: event.values[key] for key in exact if key in event.values} for event in events]

    undisturbed = run("six", 6)
    assert run("three and three", 3) == []
    assert run("three and three", 6) == undisturbed
    evaluation = next(values for values in undisturbed if "loss/averaged" in values)
    assert evaluation["loss/averaged"] != evaluation["loss"]


def run_and_harm(world: World, tree: dict[str, Any], harm: str) -> str:
    """Train; on rank 0 something happens to the files between two steps, which every step asks about."""
    config = build(RunConfig, tree)
    groups = ProcessGroups.create(config.topology, world.rank, timedelta(seconds=30), stages_of(config).all_holders())
    run_dir, asked = Path(config.training.run_dir), [0]

    def stop_asked() -> bool:
        asked[0] += 1
        if asked[0] == 3:  # once before the first step, then at the end of each
            HARMS[harm](run_dir, Path(config.data.prepared))
        return False

    try:
        train(config, groups, torch.device("cpu"), attempt="test", stop_asked=stop_asked)
    except (DataChanged, RankFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _flip(run_dir: Path, prepared: Path) -> None:
    shard = prepared / "train_00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))


def _empty(run_dir: Path, prepared: Path) -> None:
    for path in run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _replace(run_dir: Path, prepared: Path) -> None:
    run_dir.rename(run_dir.with_suffix(".moved"))
    run_dir.mkdir()


HARMS: dict[str, Callable[[Path, Path], object]] = {
    "removed": lambda run_dir, prepared: shutil.rmtree(run_dir),
    "moved": lambda run_dir, prepared: run_dir.rename(run_dir.with_suffix(".moved")),
    "emptied": _empty,
    "replaced": _replace,
    "without ledger": lambda run_dir, prepared: os.unlink(run_dir / "ledger" / "work.jsonl"),  # noqa: PTH108
    "other tokens": _flip,
    "metrics removed": lambda run_dir, prepared: os.unlink(run_dir / "metrics.jsonl"),  # noqa: PTH108
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_happens_to_a_runs_files_in_mid_run_is_said(root: Path, tmp_path: Path, harm: str) -> None:
    tree = run_config(root)
    shutil.copytree(root / "prepared", tmp_path / "prepared")
    tree["data"] = tree["data"] | {"prepared": str(tmp_path / "prepared")}
    tree["training"] = tree["training"] | {"run_dir": str(tmp_path / "run"), "sample_tokens": 0}
    (ended,) = run_processes(1, run_and_harm, tree, harm)
    expected = {"other tokens": "train_00000.bin is not what was prepared", "metrics removed": "done"}
    assert expected.get(harm, "was removed while the run was writing into it, by step 2") in ended


def test_time_that_nothing_accounts_for_is_a_stall(tmp_path: Path) -> None:
    with mock.patch("shoestring.trainer.run.reporter.time.perf_counter") as clock:
        clock.return_value = 10.0
        gaps = UnaccountedGaps()
        clock.return_value = 12.0
        gaps.account(0.5)
        assert gaps.close() == pytest.approx(1.495)
        assert gaps.close() < 0
        clock.return_value = 20.0
        gaps.account(8.0)
        assert gaps.close() < STALL_SECONDS


def run_and_stall(world: World, tree: dict[str, Any]) -> None:
    """Between two steps the process is stopped for a second, which no part of the loop knows of."""
    with patch("shoestring.trainer.loop.poll_save", lambda *_: time.sleep(0.7)):
        run_rank(world, tree)


def test_a_stop_between_steps_is_in_the_ledger(root: Path, tmp_path: Path) -> None:
    tree = run_config(root)
    tree["training"] = tree["training"] | {"run_dir": str(tmp_path / "run"), "sample_tokens": 0}
    run_processes(1, run_and_stall, tree)
    summary = summarize(tmp_path / "run")
    assert summary.buckets["stall"] >= 0.6 * 1000 * STEPS
    assert summary.unknown_ms < 500


def test_a_last_checkpoint_that_failed_names_the_one_that_a_run_goes_on_from(tmp_path: Path) -> None:
    last = Saved(4, tmp_path / "step_00000004", "no room")
    with pytest.raises(RunFailed, match=r"of step 4, .*: no room; make room; .* starts over, as there is no other one"):
        _insist(last)
    (tmp_path / "step_00000002").mkdir()
    with pytest.raises(RunFailed, match="goes on from the checkpoint of step 2"):
        _insist(last)
