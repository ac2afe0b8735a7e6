"""Warm-up before the first step, so that lazy initialization cannot deadlock inside a step.

NCCL connects at the first use (see `comm/warm_up.py`), and CUDA loads a kernel and pins memory at the first use. All
three may block: NCCL until the peer makes the same call, CUDA until the device is idle. A schedule posts its first
receives ahead, so in the first step the device is not idle until the peer has sent, which may wait for this rank.
"""

import torch

from ...comm.async_comm import AsyncCommunicator
from ...comm.host_transfer import to_device
from ...comm.streams import DeviceStreams
from ...comm.warm_up import warm_up_exchange
from ...parallelism.pipeline.instruction import run_to_completion
from ...parallelism.weight_grad import DelayedWeightGradients
from ..data.samples import TokenBatch
from ..model.forward_context import LossNormalizers
from .stage_runner import StageRunner
from .step import Stepper

_NORMALIZERS = LossNormalizers(main_loss=1e-6, mtp_loss=1e-6, balance_loss=1e-6)


def warm_up_step(
    stepper: Stepper,
    async_communicator: AsyncCommunicator,
    exchange: str,
    batch: tuple[int, int],
    device: torch.device,
    streams: DeviceStreams,
) -> None:
    """Connect communicators, load kernels and pin memory for a step, then synchronize. Collective, in one order.

    `async_communicator` runs the token exchange called `exchange`; `batch` is the shape [B, W] of a micro-batch.
    Gradients are zero afterwards; weights and random state are unchanged.
    """
    warm_up_exchange(exchange, stepper.groups, async_communicator, device)
    warm_up_kernels(stepper, batch, device)
    # After the kernels: it reduces gradients of zero, which clears the garbage that the noise has left in them.
    stepper.warm_up_communication(device)
    streams.current_stream().synchronize()


def warm_up_kernels(stepper: Stepper, batch: tuple[int, int], device: torch.device) -> None:
    """Run a micro-batch of noise forward and backward through each chunk. Collective over the expert-parallel group.

    Gradients of weights are garbage afterwards.
    """
    # Each chunk gets random hidden states: waiting for a pipeline neighbor here could deadlock as a step could.
    sequences, window = batch
    length = window - 1 - stepper.config.num_nextn_predict_layers
    generator = torch.Generator().manual_seed(stepper.groups.rank)
    # Different tokens: equal ones would all go to the same experts, more rows than a rank has memory for.
    tokens_BW = torch.randint(stepper.config.vocab_size, batch, generator=generator)
    noise = TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)).to(device)
    with stepper.model.cache_fp8_weights():
        for chunk in stepper.chunks:
            stage = StageRunner(chunk, [noise], _NORMALIZERS)
            hidden_BSD = torch.randn((sequences, length, stepper.config.hidden_size), generator=generator)
            hidden_BSD = to_device(hidden_BSD, device).to(stage.empty_activation(0).dtype)
            run_to_completion(stage.forward(0, None if chunk.stage.is_first else hidden_BSD))
            weights = DelayedWeightGradients(deferred=True)
            run_to_completion(stage.backward(0, None if chunk.stage.is_last else hidden_BSD, weights))
            weights.flush()
