"""The command line of the fuzzer: runs the requested inputs, several in parallel, and reports their results.

Imports what verbs import when they run, so that no fork has to.

Prints a line for each input that ends in a traceback, a hang, another exit code than the documented ones, or something
left behind; then counts by kind and the lines of the readers that were run. Ends with 1 where there is such an input.
A kind and a seed make the same input on every machine: `--kind corpus --first 17 --each 1` runs one again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import shoestring.launch.report.page
import shoestring.launch.report.plan_comparison
import shoestring.launch.report.watch
import shoestring.launch.verbs.budget
import shoestring.launch.verbs.checkpoint
import shoestring.launch.verbs.export_weights
import shoestring.launch.verbs.generate
import shoestring.launch.verbs.import_weights
import shoestring.launch.verbs.report
import shoestring.launch.verbs.simulate
import shoestring.launch.verbs.trace
import shoestring.trainer.checkpoint.inspect
import shoestring.trainer.data.inspect  # noqa: F401

from .kinds import KINDS
from .lines import Lines, coverage
from .seeds import make_seeds
from .trial import run_trial


def main(lines: Lines) -> int:
    """Run the requested inputs; return the exit code. `lines` counts the lines of the readers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=200, help="inputs of each kind (default 200)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="of this kind alone; may be repeated")
    parser.add_argument("--workers", type=int, default=2, help="at a time (default 2)")
    parser.add_argument("--json", type=Path, help="write the summary there")
    parser.add_argument("--words", action="store_true", help="print what every input has printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = options.kind or list(KINDS)
    inputs = [(kind, seed) for seed in range(options.first, options.first + options.each) for kind in kinds]
    with tempfile.TemporaryDirectory(prefix="shoestring-fuzz-") as name:
        root = Path(name)
        make_seeds(root / "seeds", with_plan="small files" in kinds and options.each > 10)
        start = time.monotonic()
        workers = [_start(root, number, inputs[number :: options.workers], lines) for number in range(options.workers)]
        failed = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
        trials = [json.loads(line) for path in sorted(root.glob("*.jsonl")) for line in path.read_text().splitlines()]
    if any(failed) or len(trials) != len(inputs):
        print(f"the fuzzer itself failed: workers ended with {failed}, {len(trials)} of {len(inputs)} inputs were run")
        return 1
    return _report(trials, time.monotonic() - start, options)


def _start(root: Path, number: int, inputs: Sequence[tuple[str, int]], lines: Lines) -> int:
    """Fork a process that runs `inputs` one after the other; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with (root / f"{number}.jsonl").open("w") as file:
            for index, (kind, seed) in enumerate(inputs):
                trial = run_trial(kind, seed, root / "seeds", root / f"{number}_{index}", lines)
                file.write(json.dumps(asdict(trial)) + "\n")
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _report(trials: Sequence[dict[str, Any]], seconds: float, options: argparse.Namespace) -> int:
    wrong = [trial for trial in trials if trial["wrong"]]
    for trial in trials if options.words else wrong:
        print(f"--- {trial['kind']} {trial['seed']}: {trial['wrong'] or 'right'}: {' '.join(trial['arguments'])[:300]}")
        print(trial["words"][-1500:])
    counts = Counter((trial["kind"], trial["code"]) for trial in trials)
    for kind in dict.fromkeys(trial["kind"] for trial in trials):
        codes = ", ".join(f"{count} with {code}" for (name, code), count in sorted(counts.items()) if name == kind)
        print(f"{kind}: {codes}")
    covered = coverage({(name, line) for trial in trials for name, line in trial["lines"]})
    run, there = sum(each[0] for each in covered.values()), sum(each[1] for each in covered.values())
    for name, (own_run, own, missed) in covered.items():
        print(f"{name}: {own_run} of {own} lines; not run: {' '.join(map(str, missed)) or 'none'}")
    slowest = max(trial["seconds"] for trial in trials)
    print(f"readers: {run} of {there} lines, {100 * run / there:.1f} %")
    print(f"{len(trials)} inputs in {seconds:.0f} s, the longest {slowest:.1f} s of CPU; {len(wrong)} went wrong")
    if options.json is not None:
        summary = {"inputs": len(trials), "wrong": len(wrong), "slowest": slowest, "covered": run / there}
        options.json.write_text(json.dumps(summary))
    return 1 if wrong else 0
