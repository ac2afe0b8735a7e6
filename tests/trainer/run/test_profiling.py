"""A traced run: one timeline of all ranks, and their memory."""

import json
from pathlib import Path
from typing import Any

from shoestring.tests.processes import run_processes
from shoestring.tests.trainer.small_loop import run_config, run_rank
from shoestring.trainer.telemetry.history import read_metrics


def test_a_traced_run_leaves_one_timeline_of_all_ranks(root: Path) -> None:
    tree = run_config(root) | {"topology": {"ep": 2}, "schedule": {"name": "dualpipev"}}
    tree["training"] = tree["training"] | {"run_dir": str(root / "traced"), "sample_tokens": 0}
    tree["telemetry"] = tree["telemetry"] | {"trace": True, "trace_steps": 2}
    run_processes(2, run_rank, tree)
    events = json.loads((root / "traced" / "trace" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    optimizer_steps = [event for event in events if event["name"] == "optimizer"]
    assert len(optimizer_steps) == 2 * 2  # steps 2 and 3 of each rank
    assert {"FB", "F", "B", "attn(F)", "mlp(W)", "exposed_all_to_all"} <= {event["name"] for event in events}
    metrics = read_metrics(root / "traced" / "metrics.jsonl")
    values: list[dict[str, Any]] = [dict(event.values) for event in metrics if event.kind == "trace"]
    first, second = values[0]["trace/FB"]
    assert first > 0
    assert second > 0
    (memory,) = (event for event in metrics if event.kind == "memory")  # of step 2; the next one would be at step 50
    assert memory.step == 2
    now: Any = memory.values["now"]
    assert len(now) == 2
    assert all(1e7 < size < 1e11 for size in now)
