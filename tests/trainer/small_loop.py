"""A training run small enough for seconds: its configuration, its data, and its ranks."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.build import build_stage_layout
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.loop import train
from shoestring.trainer.structured_config import build_dataclass
from shoestring.trainer.telemetry.history import read_metrics

STEPS, LENGTH, BATCH = 3, 16, 8


def run_config(root: Path) -> dict[str, Any]:
    """Return a run small enough for seconds, whose small terms are large enough to be seen."""
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
            "vocab_size": 300,
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
            "global_batch_size": BATCH,
            "seq_aux_loss_coeff": 0.1,
            "router_bias_update_rate": {0: 0.05},
            "sample_tokens": 3,
            "sample_prompt": "word",
        },
        "telemetry": {"log_every": 1, "wandb": {"mode": "disabled"}},
    }


def prepared_root(folder: Path, words: int) -> Path:
    """Prepare a corpus of `words` words for runs in `folder`; return the folder."""
    (folder / "corpus").mkdir()
    text = [f"word{index * 7919 % 211}" for index in range(words)]
    (folder / "corpus" / "train.txt").write_text(" ".join(text))
    (folder / "corpus" / "held.txt").write_text(" ".join(text[:90]))
    prepare_corpus(build_dataclass(RunConfig, run_config(folder)).data, lambda _: None)
    return folder


def run_rank(world: World, tree: dict[str, Any]) -> None:
    config = build_dataclass(RunConfig, tree)
    assert not list(config.problems())
    holders = build_stage_layout(config).replica_pp_groups()
    groups = ProcessGroups.create(config.topology, world.rank, timedelta(seconds=30), holders)
    train(config, groups, torch.device("cpu"), attempt="test")


def losses_of(
    root: Path,
    name: str,
    topology: Topology,
    micro_batch: int,
    exchange: str = "flat",
    schedule: str = "1f1b",
    **training: Any,
) -> list[dict[str, Any]]:
    tree = run_config(root) | {"topology": asdict(topology), "schedule": {"micro_batch_size": micro_batch}}
    tree["exchange"] = {"name": exchange, "check_order": True}
    tree["schedule"] = tree["schedule"] | {"name": schedule}
    tree["training"] = tree["training"] | {"run_dir": str(root / name)} | training
    run_processes(topology.world_size, run_rank, tree)
    return [
        dict(event.values) | {"kind": event.kind}
        for event in read_metrics(root / name / "metrics.jsonl")
        if event.kind in ("step", "evaluation", "sample")
    ]
