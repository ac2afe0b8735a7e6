"""Rehearsal results of written logs."""

import json
from typing import Any

from shoestring.launch.answers.terminal import terminal_text
from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.answer import rehearsal_answer
from shoestring.launch.rehearsal.log import KernelLaunches, RankLog
from shoestring.launch.rehearsal.result import RehearsalResult

CONFIG = compose_run_config(["experiment=quickstart"])
"""DualPipeV on two pipeline ranks; the model has a dense layer, three MoE layers and an MTP module."""
ATTENTION = "trainer/model/attention.py:forward"
MIDDLE = (
    KernelLaunches("attn(F)", "layer_01", "compute", "mm", ATTENTION, 32, 8000),
    KernelLaunches("attn(F)", "layer_02", "compute", "add", ATTENTION, 16, 16000),
    KernelLaunches("dispatch", "layer_02", "exchange", "index", "comm/exchange/permutation.py:spread", 6, 1200),
    KernelLaunches("attn(W)", "", "compute", "mm", "parallelism/weight_grad.py:run", 24, 2400),
    KernelLaunches("W", "", "compute", "mm", "parallelism/weight_grad.py:run", 8, 800),
    KernelLaunches("FB", "", "compute", "add", "trainer/model/chunk.py:forward", 4, 400),
    KernelLaunches("optimizer", "", "compute", "adamw", "trainer/optimizer/adamw.py:step", 10, 5000),
)
"""Launches of the second pipeline rank, which has two MoE layers only; the first has the other layers."""
ENDS = (
    KernelLaunches("attn(F)", "layer_03", "compute", "mm", ATTENTION, 24, 0),
    KernelLaunches("attn(W)", "", "compute", "mm", "parallelism/weight_grad.py:run", 100, 7000),
    KernelLaunches("dense(F)", "", "compute", "mm", ATTENTION, 400, 40000),
    KernelLaunches("attn(F)", "mtp_01", "compute", "mm", ATTENTION, 4, 4),
    KernelLaunches("optimizer", "", "compute", "adamw", "trainer/optimizer/adamw.py:step", 30, 9000),
)


def judged(*logs: RankLog) -> RehearsalResult:
    return RehearsalResult(CONFIG, logs)


def printed(result: RehearsalResult, operations: int = 0) -> str:
    return terminal_text(rehearsal_answer(result, operations), width=110, colors=False)


def tree(result: RehearsalResult) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(rehearsal_answer(result, 0).data))
    return parsed
