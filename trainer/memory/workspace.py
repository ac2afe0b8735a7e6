"""Memory of the parts of a stage, summed up from what each operation of `trainer/model/` keeps and needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ...comm.exchange.buffer_bytes import ExchangeBufferBytes, ExchangeShape
from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.factory import exchange_buffer_bytes
from ...comm.exchange.flat import routing_table_bytes
from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from ..model.config import ModelConfig
from ..model.experts import feed_forward_memory, routed_experts_memory, shared_experts_memory
from ..model.layer import FFN_INPUT, attend_memory
from ..model.loss import loss_memory
from ..model.model import embedding_memory, mtp_merge_memory
from ..model.norm import final_norm_memory
from ..model.recompute import RecomputeModule


@dataclass(frozen=True)
class WorkspaceBytes:
    """Workspace of one micro-batch by part of a stage, in bytes: needed while the part runs, beyond what is saved."""

    config: ModelConfig
    batch: MicroBatchShape
    recompute_modules: frozenset[RecomputeModule]
    exchange: ExchangeConfig
    ep_size: int
    """Ranks that share the experts of a layer."""

    @cached_property
    def hidden_state_bytes(self) -> float:
        """Bytes of one hidden state, T × D."""
        return self.batch.hidden_state_bytes(self.config)

    @cached_property
    def exchange_buffers(self) -> ExchangeBufferBytes:
        """Buffers of a token exchange."""
        config, batch = self.config, self.batch
        rows = batch.received_rows(config)
        return exchange_buffer_bytes(
            ExchangeShape(
                self.exchange,
                self.ep_size,
                batch.tokens,
                config.num_experts_per_tok,
                rows,
                config.hidden_size,
                batch.dtype,
                batch.fp8,
            )
        )

    @cached_property
    def parts_memory(self) -> StagePartsMemory:
        """Saved activations and delayed weight gradients of each part of a stage."""
        config, batch, policy = self.config, self.batch, self.recompute_modules
        tables = routing_table_bytes(batch.tokens, config.num_experts_per_tok, batch.received_rows(config))
        routing = OperationMemory((SavedActivation("routing tables", tables),))

        def part(memory: OperationMemory) -> PartMemory:
            return PartMemory(memory.saved_bytes(policy), memory.deferred_bytes, memory.wgrad)

        return StagePartsMemory(
            attention=part(self._attention),
            shared_experts=part(shared_experts_memory(config, batch)),
            routed_experts=part(routing + self._routed_experts),
            dense_layer=part(self._dense_attention + self._dense_network),
            embedding=part(embedding_memory(config, batch)),
            final_norm=part(final_norm_memory(config, batch)),
            loss=part(self._loss),
            mtp_merge=part(mtp_merge_memory(config, batch)),
        )

    def layer_bytes(self, *, is_dense: bool) -> float:
        """Return the bytes that a layer saves, with its input."""
        parts = self.parts_memory
        moe = parts.attention.saved_bytes + parts.shared_experts.saved_bytes + parts.routed_experts.saved_bytes
        return self.hidden_state_bytes + (parts.dense_layer.saved_bytes if is_dense else moe)

    @cached_property
    def saves_expert_input(self) -> bool:
        """True if the experts' input tokens are saved in the compute dtype."""
        return any(
            kept.name == FFN_INPUT and kept.is_kept(self.recompute_modules) for kept in self._attention.activations
        )

    @cached_property
    def attention_forward(self) -> float:
        """Bytes of the forward of an MoE layer's attention and router."""
        return self._attention.forward_bytes(self.recompute_modules)

    @cached_property
    def attention_backward(self) -> float:
        """Bytes of the backward of an MoE layer's attention and router."""
        return self._attention.backward_bytes(self.recompute_modules)

    @cached_property
    def dense_attention_forward(self) -> float:
        """Bytes of the forward of a dense layer's attention, with what its network recomputes."""
        dropped = self._dense_network.recomputed_bytes(self.recompute_modules)
        return self._dense_attention.forward_bytes(self.recompute_modules) + dropped

    @cached_property
    def dense_attention_backward(self) -> float:
        """Bytes of the backward of a dense layer's attention, with what its network recomputed."""
        again = self._dense_network.recomputed_bytes(self.recompute_modules)
        return self._dense_attention.backward_bytes(self.recompute_modules) + again

    @cached_property
    def dense_ffn_forward(self) -> float:
        """Bytes of the forward of a dense layer's feed-forward network."""
        return self._dense_network.forward_bytes(self.recompute_modules)

    @cached_property
    def dense_ffn_backward(self) -> float:
        """Bytes of the backward of a dense layer's feed-forward network."""
        return self._dense_network.backward_bytes(self.recompute_modules)

    @cached_property
    def shared_experts_forward(self) -> float:
        """Bytes of the forward of the shared experts."""
        return self._shared_network.forward_bytes(self.recompute_modules)

    @cached_property
    def shared_experts_backward(self) -> float:
        """Bytes of the backward of the shared experts."""
        return self._shared_network.backward_bytes(self.recompute_modules)

    @cached_property
    def routed_experts_forward(self) -> float:
        """Bytes of the forward of the routed experts, for all rows or for one block."""
        return self._routed_experts.forward_bytes(self.recompute_modules)

    @cached_property
    def routed_experts_backward(self) -> float:
        """Bytes of the backward of the routed experts, for all rows or for one block."""
        return self._routed_experts.backward_bytes(self.recompute_modules)

    @property
    def loss_logits(self) -> float:
        """Bytes of one chunk's logits, and of its part of the head's weight gradient."""
        return self._loss.forward_workspace

    @cached_property
    def _attention(self) -> OperationMemory:
        return attend_memory(self.config, self.batch, is_dense=False)

    @cached_property
    def _dense_attention(self) -> OperationMemory:
        return attend_memory(self.config, self.batch, is_dense=True)

    @cached_property
    def _dense_network(self) -> OperationMemory:
        return self._network(self.config.intermediate_size)

    @cached_property
    def _shared_network(self) -> OperationMemory:
        return self._network(self.config.n_shared_experts * self.config.moe_intermediate_size)

    def _network(self, inner: int) -> OperationMemory:
        return feed_forward_memory(self.batch.tokens, self.config.hidden_size, inner, self.batch)

    @cached_property
    def _routed_experts(self) -> OperationMemory:
        experts = self.config.n_routed_experts // self.ep_size
        return routed_experts_memory(self.config, self.batch, experts, self.recompute_modules)

    @cached_property
    def _loss(self) -> OperationMemory:
        return loss_memory(self.config, self.batch)


@dataclass(frozen=True)
class PartMemory:
    """Memory of one part of a stage, in bytes."""

    saved_bytes: float
    """Activations that its forward saves."""
    deferred_bytes: float
    """Inputs of delayed weight gradients, held from I to W."""
    wgrad_bytes: float
    """Largest weight gradient before it is accumulated."""


@dataclass(frozen=True)
class StagePartsMemory:
    """Memory of each part of a stage. A layer's input, which is another part's output, is in none of them."""

    attention: PartMemory
    shared_experts: PartMemory
    routed_experts: PartMemory
    """Routed experts with the routing tables."""
    dense_layer: PartMemory
    """Whole dense layer."""
    embedding: PartMemory
    final_norm: PartMemory
    """Norm after the last layer, with that layer's output."""
    loss: PartMemory
    mtp_merge: PartMemory
    """Merge of hidden state and embedding in an MTP module."""
