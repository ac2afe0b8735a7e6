"""Comparison of the losses of two runs, step by step; exit code 1 if they differ by more than `--within`.

python benchmarks/compare_losses.py runs/on_gpu runs/on_cpu --within 0.02
"""

import argparse
import sys
from pathlib import Path

from shoestring.trainer.telemetry.events import StepLogged
from shoestring.trainer.telemetry.history import read_metrics


def losses(run_dir: Path) -> dict[int, float]:
    """Return the loss in nats by step, of the steps that the run logged."""
    events = read_metrics(run_dir / "metrics.jsonl")
    return {event.step: event.loss for event in events if isinstance(event, StepLogged)}


def compare(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Print the relative difference of each step of `theirs`; return the largest, infinite if a step is missing."""
    worst = 0.0 if theirs else float("inf")
    for step, theirs_loss in theirs.items():
        loss = ours.get(step, float("nan"))
        difference = abs(loss - theirs_loss) / theirs_loss
        worst = max(worst, difference) if difference == difference else float("inf")
        print(f"step {step:5}  loss {loss:8.4f}  other {theirs_loss:8.4f}  difference {difference:.2%}")
    return worst


def main() -> int:
    """Compare two runs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("other", type=Path, help="run directory to compare with")
    parser.add_argument("--within", type=float, default=0.02, help="allowed relative difference (default 0.02)")
    options = parser.parse_args()
    worst = compare(losses(options.run), losses(options.other))
    print(f"largest difference {worst:.2%}, allowed {options.within:.2%}")
    return 0 if worst <= options.within else 1


if __name__ == "__main__":
    sys.exit(main())
