"""A whole model in one process, loaded from a run, a checkpoint or an import: logits, loss, gradients and text.

Letters: B batch, S sequence, V vocabulary, E experts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.exchange.flat import FlatExchange
from ...comm.files.file_io import config_error_context
from ...comm.groups import ExpertGroups, Group
from ...parallelism.pipeline.instruction import run_to_completion
from ...parallelism.weight_grad import DelayedWeightGradients
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.find import find_checkpoint
from ..checkpoint.manifest import damage_error_context
from ..checkpoint.pieces import MODEL_STATE, expert_tensor_name
from ..checkpoint.tokenizer import checkpoint_eos_token_id, has_tokenizer
from ..checkpoint.training_state import model_pieces
from ..data.tokenizer import TOKENIZER_FILE, decode_with_bpe, encode_with_bpe, parse_tokenizer_json
from ..huggingface.tensor_names import make_tensor_mappings
from ..model.attention_backend import CPU_ATTENTION, AttentionBackend, AttentionShape, choose_attention
from ..model.chunk import Chunk
from ..model.config import ModelConfig
from ..model.forward_context import LossNormalizers, StageBackward
from ..model.model import Model
from .speculative_decoding import Continuation, NonFiniteLogits, TokenSampler, generate_speculatively

_DAMAGED = "is damaged; choose another with --step"


class LoadedModel(nn.Module):
    """Every layer of a checkpoint's model. Parameters have the checkpoint's dtype, gradients FP32 at least."""

    def __init__(self, chunk: Chunk, checkpoint: Checkpoint) -> None:
        """Take `chunk`, which holds all layers of `checkpoint`."""
        super().__init__()
        self.model: Model = chunk.model
        self.config: ModelConfig = chunk.model.config
        self.checkpoint = checkpoint
        self._chunk = chunk
        # A leaf that requires a gradient, so that autograd runs the backward of a loss; it never gets one.
        self._root = torch.zeros((), requires_grad=True)
        for parameter in self.parameters():
            parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Return the logits of the token after each of the int64 tokens, [B, S, V], without a graph: see `loss`."""
        return run_to_completion(self._chunk.compute_logits(self._on_device(tokens_BS)))

    forward = logits

    @torch.no_grad()
    def mtp_logits(self, tokens_BS: Tensor) -> Tensor:
        """Return the first MTP module's logits [B, S - 1, V]: those at position i are of token i + 2.

        Raises `ValueError` for a model without MTP.
        """
        if not self.config.num_nextn_predict_layers:
            raise ValueError("the model has no MTP module")
        tokens_BS = self._on_device(tokens_BS)
        hidden_BSD = run_to_completion(self._chunk.compute_hidden_states(tokens_BS[:, :-1]))
        return run_to_completion(self._chunk.compute_mtp_logits(hidden_BSD, tokens_BS[:, 1:]))

    def loss(self, tokens_BS: Tensor, mtp_weight: float = 0.0) -> Tensor:
        """Return the mean cross-entropy in nats of tokens 1 to S - 1, each given those before it.

        `mtp_weight` times the mean over MTP depths is added, whose sums are divided by the same B · (S - 1), as in the
        report (eq. 24-25). `backward`, once, adds gradients to the parameters; it runs the split backward of training.
        """
        tokens_BS, depth = self._on_device(tokens_BS), self.config.num_nextn_predict_layers
        targets = tokens_BS[:, 1:].numel()
        # A window of the trainer ends with one more token per MTP depth; here they are padding, which counts nowhere.
        tokens_BW = F.pad(tokens_BS, (0, depth))
        valid_BW = F.pad(torch.ones_like(tokens_BS, dtype=torch.bool), (0, depth))
        normalizers = LossNormalizers(1 / targets, mtp_weight / (max(depth, 1) * targets), balance_loss=0.0)
        head = self._head_weight
        # The cross-entropy adds the head's gradient to `.grad` in the forward: it is kept aside until the backward.
        before, head.grad = head.grad, None
        done = run_to_completion(self._chunk.forward(tokens_BW, valid_BW, normalizers))
        grad_VD, head.grad = head.grad, before
        sums = done.metrics
        loss = sums.main_loss_sum * normalizers.main_loss + sums.mtp_loss_sum * normalizers.mtp_loss
        if not torch.is_grad_enabled():
            return loss
        attached: Tensor = _Loss.apply(self._root, loss, partial(self._run_backward, done.backward, grad_VD))  # type: ignore[no-untyped-call]
        return attached

    def hugging_face_weights(self) -> dict[str, Tensor]:
        """Return weights and routing biases as views, by their names in the released weights.

        Rotated rows are in adjacent pairs, as there (`rope_interleave` of `transformers`).
        """
        return self._by_hugging_face_name(lambda parameter: parameter.detach())

    def hugging_face_gradients(self) -> dict[str, Tensor]:
        """Return the gradients as views, by the names of `hugging_face_weights`; parameters without one are absent."""
        return self._by_hugging_face_name(lambda parameter: parameter.grad)

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Tokenizer of the checkpoint. Raises `ConfigError` if it has none."""
        if not has_tokenizer(self.checkpoint):
            hint = f"has no {TOKENIZER_FILE}, so it cannot read a prompt"
            raise ConfigError([Problem("checkpoint", str(self.checkpoint.path), hint)])
        path = self.checkpoint.path / TOKENIZER_FILE
        with config_error_context(path, "take another checkpoint"), damage_error_context(_DAMAGED):
            return parse_tokenizer_json(self.checkpoint.read_attachment(TOKENIZER_FILE))

    @cached_property
    def stop_token_id(self) -> int | None:
        """Token after each document of the data; None if nothing names it. Raises `ConfigError`."""
        path = self.checkpoint.path / TOKENIZER_FILE
        with config_error_context(path, "take another checkpoint"), damage_error_context(_DAMAGED):
            return checkpoint_eos_token_id(self.checkpoint)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`. Raises `ConfigError` if there are none, or one outside of the vocabulary."""
        with config_error_context(self.checkpoint.path / TOKENIZER_FILE, "take another checkpoint"):
            tokens = encode_with_bpe(self.tokenizer, text)
        if not tokens or max(tokens) >= self.config.vocab_size:
            hint = f"there must be at least one token id, and all must be below vocab_size {self.config.vocab_size}"
            raise ConfigError([Problem("--prompt", text, f"{TOKENIZER_FILE} gives {tokens[:8]}: {hint}")])
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`. Raises `ConfigError`."""
        with config_error_context(self.checkpoint.path / TOKENIZER_FILE, "take another checkpoint"):
            return decode_with_bpe(self.tokenizer, list(tokens))

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        *,
        temperature: float = 0.8,
        seed: int = 0,
        use_mtp_draft: bool = True,
    ) -> Continuation:
        """Continue `prompt` until the end token, or by `max_new_tokens`; `decode` gives the text.

        The model sees as many tokens as it was trained on. A `temperature` of 0 is greedy. Raises `ConfigError`.
        """
        raise_if_any(generation_problems(prompt, max_new_tokens, temperature))
        sampler = TokenSampler(torch.Generator().manual_seed(seed), temperature)
        try:
            return generate_speculatively(
                self._chunk,
                self.encode(prompt),
                max_new_tokens,
                _context_length(self.checkpoint),
                sampler,
                stop_token_id=self.stop_token_id,
                use_drafts=use_mtp_draft,
            )
        except NonFiniteLogits as error:
            hint = f"{error}; take another checkpoint, or correct its model's values (such as routed_scaling and yarn)"
            raise ConfigError([Problem("checkpoint", str(self.checkpoint.path), hint)]) from error

    def _run_backward(self, backward: StageBackward, head_grad_VD: Tensor | None, factor: float) -> None:
        """Add `factor` times the gradients of a loss to the parameters'."""
        parameters = list(self.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._head_weight.grad = head_grad_VD
        run_to_completion(backward(None, DelayedWeightGradients()))
        # The chunk differentiates the loss itself: the factor applies to what it has added, which joins what was there.
        for parameter, old in zip(parameters, before, strict=True):
            added = parameter.grad if parameter.grad is None or factor == 1.0 else parameter.grad.mul_(factor)
            parameter.grad = added if old is None else old if added is None else old.add_(added)

    @property
    def _head_weight(self) -> Tensor:
        assert self.model.head is not None
        return self.model.head.weight

    def _on_device(self, tokens_BS: Tensor) -> Tensor:
        return tokens_BS.to(next(self.parameters()).device)

    def _by_hugging_face_name(self, read: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        values = dict(self._by_canonical_name(read))
        named: dict[str, Tensor] = {}
        for entry in make_tensor_mappings(self.config):
            if (value := values.get(entry.name)) is not None:
                named |= zip(entry.hf_names, value.chunk(len(entry.hf_names)), strict=True)
        return named

    def _by_canonical_name(self, read: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        experts = self.model.expert_parameter_names()
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            value, canonical = read(tensor), f"{MODEL_STATE}/{name}"
            if value is not None and name in experts:
                yield from ((expert_tensor_name(canonical, number), part) for number, part in enumerate(value))
            elif value is not None:
                yield canonical, value


def load_model(
    directory: Path,
    *,
    step: int | None = None,
    ema_weights: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load the checkpoint in `directory`, or of the run there the one of `step` (None: the newest).

    `ema_weights` takes the moving average of the weights. Computes in `dtype`, by default BF16 on a GPU and FP32 on a
    CPU; `device` is by default the GPU if there is one. Raises `ConfigError`.
    """
    checkpoint = find_checkpoint(directory, step)
    if ema_weights:
        checkpoint = checkpoint.with_ema_weights()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = checkpoint.model_config
    widths = model.qk_head_dim, model.v_head_dim
    case = AttentionShape(1, model.num_attention_heads, _context_length(checkpoint), *widths, dtype=dtype)
    attention = choose_attention("auto", case, device)
    with damage_error_context(_DAMAGED):
        return LoadedModel(load_chunk_for_inference(checkpoint, device, dtype, attention), checkpoint)


def load_chunk_for_inference(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: AttentionBackend = CPU_ATTENTION
) -> Chunk:
    """Return all layers in one chunk that computes in `dtype`; parameters keep the checkpoint's dtype.

    Raises `CheckpointDamaged`.
    """
    config = checkpoint.model_config
    with torch.device(device):
        model = Model(config)
    stored = checkpoint.manifest.tensors[f"{MODEL_STATE}/embedding.weight"].dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    model.set_attention(attention)
    for piece in model_pieces(model):
        checkpoint.fill_piece(piece)
    alone = Group((0,), None, 0, timedelta(seconds=1))
    return Chunk(model, FlatExchange(ExpertGroups(alone, alone, alone), config.n_routed_experts), dtype)


def generation_problems(prompt: str, max_new_tokens: int, temperature: float) -> Iterator[Problem]:
    """Yield every problem of the options of `generate`, by their names on the command line."""
    if not prompt:
        yield Problem("--prompt", prompt, "must not be empty")
    if max_new_tokens < 1:
        yield Problem("--tokens", max_new_tokens, "must be at least 1")
    if not 0 <= temperature < math.inf:
        yield Problem("--temperature", temperature, "must be finite and at least 0 (greedy)")


def _context_length(checkpoint: Checkpoint) -> int:
    return checkpoint.config_value("training", "sequence_length", default=4096)


class _Loss(torch.autograd.Function):
    """A computed loss whose backward is a function of the factor that autograd hands to it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, loss: Tensor, backward: Callable[[float], None]) -> Tensor:
        ctx.run = backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        run, ctx.run = ctx.run, None
        if run is None:
            raise RuntimeError("the backward of this loss has run, which frees its activations; compute the loss again")
        run(float(grads[0]))
        return None, None, None
