"""The quickstart on two processes of this machine: forecasts after `shoestring calibrate` and measured steps.

    python benchmarks/planner_quickstart.py [--json benchmarks/results/planner_quickstart_2core.json]

Needs an idle machine with two cores. Calibrates kernels on two processes (without running a layout), then for each
layout forecasts a step and trains: the median of 20 steps after five warm-up steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shoestring.launch.run.rank_environment import build_rank_environment
from shoestring.launch.verbs.calibrate import calibrate
from shoestring.launch.verbs.simulate import simulate

WARM_UP, STEPS = 5, 20
LAYOUTS = {
    "data parallel": ["topology.pp=1", "topology.edp=2", "topology.ep=1", "schedule=1f1b"],
    "experts over two": ["topology.pp=1", "topology.edp=1", "topology.ep=2", "schedule=1f1b"],
    "pipeline, 1F1B": ["topology.pp=2", "topology.edp=1", "topology.ep=1", "schedule=1f1b"],
    "pipeline, ZB1P": ["topology.pp=2", "topology.edp=1", "topology.ep=1", "schedule=zb_h1"],
    "pipeline, GPipe": ["topology.pp=2", "topology.edp=1", "topology.ep=1", "schedule=gpipe"],
    "pipeline, DualPipeV": ["topology.pp=2", "topology.edp=1", "topology.ep=1", "schedule=dualpipev"],
}


def overrides(layout: list[str]) -> list[str]:
    return ["experiment=quickstart", *layout, "schedule.micro_batch_size=2"]


def shoestring(*arguments: str) -> None:
    command = [sys.executable, "-m", "shoestring.launch.cli", *arguments]
    done = subprocess.run(
        command, env=build_rank_environment(), check=False, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(done.stderr)


def forecast(layout: list[str], calibration: Path) -> float:
    """Return the forecast seconds of a step."""
    return simulate([*overrides(layout), "cluster=measured"], calibration, {}).forecast.step_seconds


def measure(layout: list[str], folder: Path) -> float:
    """Train; return the median seconds of a step."""
    steps = WARM_UP + STEPS
    size = 16 * 128
    run = folder / "run"
    settings = [f"training.run_dir={run}", f"training.tokens={steps * size}", "training.evaluate_every=0"]
    settings += ["training.checkpoint_every=0", "training.sample_tokens=0", "telemetry.log_every=1"]
    settings.append(f"data.prepared={folder / 'data'}")
    shoestring("train", *overrides(layout), *settings, "--fresh")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps_seen = [event for event in events if "tokens_per_second" in event]
    rates: dict[int, float] = {event["step"]: event["tokens_per_second"] for event in steps_seen}
    return statistics.median(size / rates[step] for step in range(WARM_UP + 1, steps + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    errors: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        calibration = Path(scratch) / "calibration"
        shoestring("data", "prepare", "experiment=quickstart", f"data.prepared={Path(scratch) / 'data'}")
        calibrate(["experiment=quickstart"], None, calibration, ranks=2, repeats=20)
        for name, layout in LAYOUTS.items():
            predicted, measured = forecast(layout, calibration), measure(layout, Path(scratch))
            error = predicted / measured - 1
            errors.append(abs(error))
            rows.append({"layout": name, "forecast": predicted, "measured": measured, "error": error})
            both = f"{predicted * 1e3:8.1f} ms forecast {measured * 1e3:8.1f} ms measured"
            print(f"{name:<22} {both} {error:+7.1%}", flush=True)
    print(f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    if options.json is not None:
        options.json.write_text(json.dumps({"steps": STEPS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
