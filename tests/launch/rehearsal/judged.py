"""Verdicts on written logs."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from shoestring.launch.compose import compose_run
from shoestring.launch.rehearsal.log import Launches, RankLog
from shoestring.launch.rehearsal.tables import verdict_table, verdict_tree
from shoestring.launch.rehearsal.verdict import Verdict, judge

CONFIG = compose_run(["experiment=quickstart"])
"""DualPipeV on two pipeline ranks; its model has a dense layer, three MoE layers and an MTP module."""
ATTENTION = "trainer/model/attention.py:forward"
MIDDLE = (
    Launches("attn(F)", "layer_01", "compute", "mm", ATTENTION, 32, 8000),
    Launches("attn(F)", "layer_02", "compute", "add", ATTENTION, 16, 16000),
    Launches("dispatch", "layer_02", "exchange", "index", "comm/exchange/permutation.py:spread", 6, 1200),
    Launches("attn(W)", "", "compute", "mm", "parallelism/weight_grad.py:run", 24, 2400),
    Launches("W", "", "compute", "mm", "parallelism/weight_grad.py:run", 8, 800),
    Launches("FB", "", "compute", "add", "trainer/model/chunk.py:forward", 4, 400),
    Launches("optimizer", "", "compute", "adamw", "trainer/optimizer/adamw.py:step", 10, 5000),
)
"""Of the second pipeline rank, which has two MoE layers and nothing else; the first has one, and the rest."""
ENDS = (
    Launches("attn(F)", "layer_03", "compute", "mm", ATTENTION, 24, 0),
    Launches("attn(W)", "", "compute", "mm", "parallelism/weight_grad.py:run", 100, 7000),
    Launches("dense(F)", "", "compute", "mm", ATTENTION, 400, 40000),
    Launches("attn(F)", "mtp_01", "compute", "mm", ATTENTION, 4, 4),
    Launches("optimizer", "", "compute", "adamw", "trainer/optimizer/adamw.py:step", 30, 9000),
)


def judged(*logs: RankLog) -> Verdict:
    return judge(CONFIG, logs)


def printed(verdict: Verdict, passes: int = 0) -> str:
    console = Console(width=110, markup=False)
    text, tables = verdict_table(verdict, passes)
    with console.capture() as capture:
        console.print(tables)
    return f"{text}\n{capture.get()}"


def tree(verdict: Verdict) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(verdict_tree(verdict)))
    return parsed
