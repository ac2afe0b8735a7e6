"""A rank of a tiny model, rehearsed in another process as `rehearse` does it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.log import RankLog
from shoestring.trainer.config import RunConfig

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


def config_of(log: RankLog) -> RunConfig:
    if log.rank == BF16_RANK:
        return compose_run_config(BF16)
    return compose_run_config([*FP8, f"training.global_batch_size={4 * MICRO_BATCHES}"])
