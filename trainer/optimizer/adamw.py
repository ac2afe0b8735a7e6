"""AdamW (arXiv 1711.05101) with moments in BF16 and arithmetic in the dtype of the master weights (report §3.3.2).

The moments are widened and updated, the weights are updated with the wide moments, and the moments are then rounded to
nearest.

Letters: N elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .config import OptimizerConfig

SLICE_ELEMENTS = 2**18  # per slice: the FP32 copies of two moments, 2 MB, stay in a cache
GPU_SLICE_ELEMENTS = 2**24


@dataclass(frozen=True)
class AdamW:
    """AdamW by torch's fused kernel. See `parallelism.zero.optimizer.OptimizerUpdate`."""

    config: OptimizerConfig

    def __call__(
        self,
        master_n: Tensor,
        grad_n: Tensor,
        exp_avg_n: Tensor,
        exp_avg_sq_n: Tensor,
        *,
        rate: float,
        step: int,
        decays: bool,
    ) -> None:
        """Update the weights and moments of one step, in place."""
        if not master_n.numel():
            return
        state = (master_n, grad_n, exp_avg_n, exp_avg_sq_n)
        if exp_avg_n.dtype == master_n.dtype:
            self._fused(*state, rate, step, decays)
            return
        # The kernel requires moments of the master's dtype. They are widened a slice at a time, to bound the copies.
        size = GPU_SLICE_ELEMENTS if master_n.is_cuda else SLICE_ELEMENTS
        for master, grad, exp_avg, exp_avg_sq in zip(*(tensor.split(size) for tensor in state), strict=True):
            wide, wide_sq = exp_avg.to(master.dtype), exp_avg_sq.to(master.dtype)
            self._fused(master, grad, wide, wide_sq, rate, step, decays)
            exp_avg.copy_(wide)
            exp_avg_sq.copy_(wide_sq)

    def _fused(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rate: float, step: int, decays: bool
    ) -> None:
        config = self.config
        # Filled on the device, so that the host does not wait for a copy.
        steps_taken = torch.full((), step - 1, dtype=torch.float32, device=master.device)
        adamw(
            [master],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [steps_taken],
            fused=True,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=rate,
            weight_decay=config.weight_decay if decays else 0.0,
            eps=config.eps,
            maximize=False,
        )


@dataclass(frozen=True)
class AdamWReference:
    """Reference of `AdamW`: its formulas in plain tensor operations."""

    config: OptimizerConfig

    def __call__(
        self,
        master_n: Tensor,
        grad_n: Tensor,
        exp_avg_n: Tensor,
        exp_avg_sq_n: Tensor,
        *,
        rate: float,
        step: int,
        decays: bool,
    ) -> None:
        """Update the weights and moments of one step, in place."""
        config = self.config
        exp_avg = config.beta1 * exp_avg_n.to(master_n.dtype) + (1 - config.beta1) * grad_n
        exp_avg_sq = config.beta2 * exp_avg_sq_n.to(master_n.dtype) + (1 - config.beta2) * grad_n.square()
        unbiased = exp_avg / (1 - config.beta1**step)
        unbiased_sq = exp_avg_sq / (1 - config.beta2**step)
        if decays:
            master_n *= 1 - rate * config.weight_decay
        master_n -= rate * unbiased / (unbiased_sq.sqrt() + config.eps)
        exp_avg_n.copy_(exp_avg)
        exp_avg_sq_n.copy_(exp_avg_sq)
