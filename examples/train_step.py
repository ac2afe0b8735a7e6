"""One training step of the model on this CPU: losses, split backward, ZeRO-1, routing biases. python train_step.py"""

from datetime import timedelta

import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import NULL_RECORDER
from shoestring.launch.compose import compose_run_config
from shoestring.trainer.build import build_engine
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.run.step import StepSettings

config = compose_run_config(["model=tiny", "training.sequence_length=64", "training.global_batch_size=4"])
groups = ProcessGroups.create(config.topology, rank=0, timeout=timedelta(seconds=60))
engine = build_engine(config, groups, torch.device("cpu"), NULL_RECORDER)
tokens_BW = torch.randint(config.model.vocab_size, (config.schedule.micro_batch_size, config.tokens_per_sample))
batches = [TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool))] * config.num_micro_batches
settings = StepSettings(3e-4, 1.0, 1e-4, 0.3, 1e-3)  # rate, clip norm, balance and MTP loss weights, bias update speed
for step in range(2):
    result = engine.stepper.step(batches, config.training.global_batch_size, settings)
    print(f"step {step}: loss {result.loss:.4f}, MTP {result.mtp_loss:.4f}, gradient norm {result.grad_norm:.2f}")
engine.close()
