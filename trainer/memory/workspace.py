"""Memory of the parts of a stage, summed up from what each operation of `trainer/model/` keeps and needs."""

from dataclasses import dataclass
from functools import cached_property

from ...comm.exchange.buffer_bytes import ExchangeBufferBytes, ExchangeShape
from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.factory import exchange_buffer_bytes
from ...comm.exchange.flat import routing_table_bytes
from ...parallelism.pipeline.chunk_walk import LayerPart
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
    """Memory of one micro-batch by part of a stage, in bytes: what a part saves, and its workspace while it runs."""

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
    def parts(self) -> "dict[LayerPart, PartMemory]":
        """Memory of each part of a stage. A layer's input, which is another part's output, is in none of them."""
        config, batch, message = self.config, self.batch, self.hidden_state_bytes
        tables = routing_table_bytes(batch.tokens, config.num_experts_per_tok, batch.received_rows(config))
        routing = OperationMemory((SavedActivation("routing tables", tables),))
        shared = self._network(config.n_shared_experts * config.moe_intermediate_size)
        routed = routed_experts_memory(config, batch, config.n_routed_experts // self.ep_size, self.recompute_modules)
        loss = loss_memory(config, batch)
        return {
            LayerPart.ATTENTION: self._part(self._attention, *self._workspace(self._attention)),
            LayerPart.SHARED_EXPERTS: self._part(shared_experts_memory(config, batch), *self._workspace(shared)),
            # The routed experts' workspace is that of all rows, or of one block.
            LayerPart.ROUTED_EXPERTS: self._part(routing + routed, *self._workspace(routed)),
            LayerPart.DENSE_LAYER: self._dense_layer,
            LayerPart.EMBEDDING: self._part(embedding_memory(config, batch)),
            # With the last layer's output.
            LayerPart.FINAL_NORM: self._part(final_norm_memory(config, batch)),
            # One chunk's logits, and its part of the head's weight gradient.
            LayerPart.LOSS: self._part(loss, loss.forward_workspace),
            LayerPart.MTP_MERGE: self._part(mtp_merge_memory(config, batch)),
            # Sums of the routed experts' results, and with the shared experts'.
            LayerPart.MERGE: PartMemory(message, 0.0, 0.0, 2 * message),
        }

    def layer_bytes(self, *, is_dense: bool) -> float:
        """Return the bytes that a layer saves, with its input."""
        moe = (LayerPart.ATTENTION, LayerPart.SHARED_EXPERTS, LayerPart.ROUTED_EXPERTS)
        kept = [self.parts[part].saved_bytes for part in ((LayerPart.DENSE_LAYER,) if is_dense else moe)]
        return self.hidden_state_bytes + sum(kept)

    @cached_property
    def saves_expert_input(self) -> bool:
        """True if the experts' input tokens are saved in the compute dtype."""
        return any(
            kept.name == FFN_INPUT and kept.is_kept(self.recompute_modules) for kept in self._attention.activations
        )

    @cached_property
    def _attention(self) -> OperationMemory:
        """Attention and router of an MoE layer."""
        return attend_memory(self.config, self.batch, is_dense=False)

    @property
    def _dense_layer(self) -> "PartMemory":
        attention = attend_memory(self.config, self.batch, is_dense=True)
        network = self._network(self.config.intermediate_size)
        again = network.recomputed_bytes(self.recompute_modules)  # allocated while attention runs
        (forward, backward), (ffn_forward, ffn_backward) = self._workspace(attention), self._workspace(network)
        forward = max(forward + again, ffn_forward + self.hidden_state_bytes)
        return self._part(attention + network, forward, max(ffn_backward, backward + again))

    def _network(self, inner: int) -> OperationMemory:
        return feed_forward_memory(self.batch.tokens, self.config.hidden_size, inner, self.batch)

    def _workspace(self, memory: OperationMemory) -> tuple[float, float]:
        return memory.workspace_bytes(self.recompute_modules)

    def _part(self, memory: OperationMemory, forward: float = 0.0, backward: float = 0.0) -> "PartMemory":
        saved = memory.saved_bytes(self.recompute_modules)
        return PartMemory(saved, memory.deferred_bytes, memory.wgrad, forward, backward)


@dataclass(frozen=True)
class PartMemory:
    """Memory of one part of a stage, in bytes."""

    saved_bytes: float
    """Activations that its forward saves."""
    deferred_bytes: float
    """Inputs of delayed weight gradients, held from I to W."""
    wgrad_bytes: float
    """Largest weight gradient before it is accumulated."""
    forward_bytes: float = 0.0
    """Workspace of its forward."""
    backward_bytes: float = 0.0
    """Workspace of its backward."""
