"""Memory of an operation of the model, in bytes.

Each module of `trainer/model/` states below its code what its operations keep and need; `trainer/memory/` sums that up.

Letters: T tokens, R rows received.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..model.config import ModelConfig
from ..model.recompute import RecomputeModule


@dataclass(frozen=True)
class MicroBatchShape:
    """Shape and formats of one micro-batch on one rank."""

    sequences: int
    sequence_length: int
    """Tokens per sequence."""
    dtype: torch.dtype
    """Dtype of activations."""
    on_cpu: bool
    """True on a CPU, where attention saves probabilities of short sequences, not one number per query and head."""
    expert_rows_override: float | None = None
    """Rows that the experts of this rank receive; None: the average over ranks, top-k per token."""
    fp8: bool = False
    """True if Linears compute in FP8 and save their inputs in it."""
    expert_block_rows: int | None = None
    """Largest number of rows that the experts compute in one call; see `model.experts`. None: no limit."""

    @property
    def tokens(self) -> int:
        """T, tokens of the micro-batch."""
        return self.sequences * self.sequence_length

    @property
    def element_bytes(self) -> int:
        """Bytes per number in the compute dtype."""
        return self.dtype.itemsize

    @property
    def fp32_element_bytes(self) -> int:
        """Bytes per number of tensors that are FP32 or wider: gates, affinities, row sums, weight gradients."""
        return torch.promote_types(self.dtype, torch.float32).itemsize

    @property
    def is_narrow(self) -> bool:
        """True if the compute dtype is narrower than FP32."""
        return self.element_bytes < self.fp32_element_bytes

    @property
    def gradient_copy_bytes(self) -> int:
        """Bytes per number of a weight gradient before it is added to an FP32 sum; 0 if the GEMM adds to the sum."""
        # The product in the compute dtype, and on a CPU the FP32 copy of it that the addition makes.
        return self.element_bytes + self.fp32_element_bytes * self.on_cpu if self.is_narrow else 0

    @property
    def emulates_fp8(self) -> bool:
        """True if the reference backend multiplies FP8 numbers: on a CPU."""
        return self.fp8 and self.on_cpu

    def received_rows(self, config: ModelConfig) -> float:
        """Return R, the rows that the experts of this rank receive."""
        return (
            self.tokens * config.num_experts_per_tok if self.expert_rows_override is None else self.expert_rows_override
        )

    def uses_row_blocks(self, config: ModelConfig) -> bool:
        """Return True if the experts compute their rows in blocks."""
        return self.expert_block_rows is not None and self.received_rows(config) > self.expert_block_rows

    def hidden_state_bytes(self, config: ModelConfig) -> float:
        """Return the bytes of one hidden state, T × D."""
        return self.tokens * config.hidden_size * self.element_bytes


@dataclass(frozen=True)
class SavedActivation:
    """Tensor, or group of tensors, that a forward saves for its backward."""

    name: str
    nbytes: float
    recompute_module: RecomputeModule | None = None
    """Recompute module under which it is recomputed instead of saved; None: it is always saved."""
    needed_for_wgrad: bool = False
    """True if a weight gradient needs it: it, or its recomputed copy, is held between I and W."""
    recompute_source_of: RecomputeModule | None = None
    """Recompute module whose recomputation needs it as input: it is saved only under that module."""

    def is_kept(self, policy: Collection[RecomputeModule]) -> bool:
        """Return whether it is saved under `policy`."""
        return self.recompute_module not in policy and (
            self.recompute_source_of is None or self.recompute_source_of in policy
        )


@dataclass(frozen=True)
class OperationMemory:
    """Memory of one operation, for any recompute policy. An input that another operation saves is not counted."""

    activations: tuple[SavedActivation, ...] = ()
    """Everything that its forward may save."""
    output_gradients: float = 0.0
    """Bytes of the gradients of its outputs that delayed weight gradients need, from I to W."""
    wgrad: float = 0.0
    """Bytes of its largest weight gradient before that is accumulated."""
    forward_workspace: float = 0.0
    """Peak bytes of its forward beyond what it may save."""
    backward_workspace: float = 0.0
    """Peak bytes of its backward beyond what was saved or is recomputed."""

    def __add__(self, later: "OperationMemory") -> "OperationMemory":
        """Return both as one operation, which reaches its peaks while it holds the activations of both."""
        return OperationMemory(
            self.activations + later.activations,
            self.output_gradients + later.output_gradients,
            max(self.wgrad, later.wgrad),
            max(self.forward_workspace, later.forward_workspace),
            max(self.backward_workspace, later.backward_workspace),
        )

    def saved_bytes(self, policy: Collection[RecomputeModule] = ()) -> float:
        """Return the bytes that its forward saves under `policy`."""
        return sum(kept.nbytes for kept in self.activations if kept.is_kept(policy))

    @property
    def deferred_bytes(self) -> float:
        """Bytes held from I to W, under any policy."""
        return self.output_gradients + sum(kept.nbytes for kept in self.activations if kept.needed_for_wgrad)

    def workspace_bytes(self, policy: Collection[RecomputeModule]) -> tuple[float, float]:
        """Return the workspaces of its forward and its backward under `policy`.

        The forward still holds the activations that `policy` will recompute; the backward recomputes them.
        """
        again = self.recomputed_bytes(policy)
        return self.forward_workspace + again, self.backward_workspace + again

    def recomputed_bytes(self, policy: Collection[RecomputeModule]) -> float:
        """Return the bytes that its backward recomputes under `policy`."""
        return sum(
            kept.nbytes
            for kept in self.activations
            if kept.recompute_module in policy and kept.recompute_source_of is None
        )
