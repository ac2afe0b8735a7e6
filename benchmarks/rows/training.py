"""One training step of the tiny model: in BF16 with its experts over all ranks, against FP32 in one CPU process.

Letters: B batch, W window of tokens.
"""

from __future__ import annotations

import math
from datetime import timedelta

import torch
from torch import Tensor

from shoestring.benchmarks.rows.row import Check, Figures, Machine, expect
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.open_exchange import open_exchange
from shoestring.comm.open_groups import open_groups_on
from shoestring.comm.pending import open_worker
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import Traffic
from shoestring.launch.compose import compose_run
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.batch import TokenBatch
from shoestring.trainer.rank import Pipeline, build_model, build_stepper, stages_of
from shoestring.trainer.step import StepSettings

SETTINGS = StepSettings(learning_rate=1e-3, clip_norm=1.0, balance_weight=1e-4, mtp_weight=0.3, bias_speed=0.001)
TIMEOUT = timedelta(minutes=2)
SEQUENCES = 2
"""Of each rank."""


def training_step(machine: Machine) -> Figures:
    """Loss and gradient norm of the first step, then the time of a step."""
    ranks, rank = machine.world.size, machine.world.rank
    ep = math.gcd(ranks, 16)  # the tiny model has 16 experts
    grid = [f"topology.ep={ep}", f"topology.edp={ranks // ep}", f"training.global_batch={SEQUENCES * ranks}"]
    config = compose_run(["model=tiny", *grid, f"schedule.micro_batch={SEQUENCES}"])
    shape = (SEQUENCES * ranks, config.window)
    tokens_BW = torch.randint(config.model.vocabulary, shape, generator=torch.Generator().manual_seed(0))

    alone = ProcessGroups.create(Topology(), 0, TIMEOUT)
    single = compose_run(["model=tiny"])
    oracle = _Trainer(single, alone, torch.device("cpu"), torch.float32, tokens_BW, SEQUENCES * ranks)
    truth = oracle.step()
    oracle.close()

    make = open_groups_on(machine.device, rank, TIMEOUT)
    groups = ProcessGroups.create(config.topology, rank, TIMEOUT, open_groups=make)
    mine_BW = tokens_BW[SEQUENCES * rank : SEQUENCES * (rank + 1)]
    trainer = _Trainer(config, groups, machine.device, torch.bfloat16, mine_BW, SEQUENCES * ranks)
    loss, norm = trainer.step()
    seconds = machine.seconds(trainer.step, repeats=3)
    trainer.close()
    return {
        "loss": loss,
        "fp32_loss": truth[0],
        "loss_error": expect("the loss", abs(loss - truth[0]) / truth[0], 5e-3),
        "norm_error": expect("the gradient norm", abs(norm - truth[1]) / truth[1], 5e-2),
        "step_ms": seconds * 1e3,
    }


class _Trainer:
    """One rank's model and optimizer, and one batch."""

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroups,
        device: torch.device,
        dtype: torch.dtype,
        tokens_BW: Tensor,
        sequences: int,
    ) -> None:
        model = build_model(config, groups, device)
        self._worker = open_worker(groups.ep, device)
        traffic = Traffic(config.topology, groups.rank)
        exchange = open_exchange(config.exchange, groups, config.model.experts, self._worker, traffic)
        pipeline = Pipeline.open(stages_of(config), groups, device)
        self._stepper = build_stepper(pipeline, model, exchange, dtype, 1, config.optimizer)
        self._batch = TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)).to(device)
        self._sequences = sequences

    def step(self) -> tuple[float, float]:
        """Loss and gradient norm of the global batch."""
        result = self._stepper.step([self._batch], self._sequences, SETTINGS)
        return result.loss, result.grad_norm

    def close(self) -> None:
        self._worker.close()
        self._stepper.optimizer.close()


CHECKS = (Check("training step, tiny, bf16", training_step, mandatory=True),)
