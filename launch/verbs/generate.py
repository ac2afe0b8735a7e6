"""`shoestring generate`: text from a checkpoint, with speculative decoding by its MTP module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import config_error_context
from ...trainer.checkpoint.checkpoint import Checkpoint
from ...trainer.checkpoint.find import find_checkpoint
from ...trainer.checkpoint.manifest import CheckpointDamaged
from ...trainer.data.tokenizer import END_TOKEN, decode_with_bpe, encode_with_bpe, parse_tokenizer_json
from ...trainer.generation.load import load_chunk_for_inference
from ...trainer.generation.speculative_decoding import (
    Continuation,
    NonFiniteLogits,
    TokenSampler,
    generate_speculatively,
)
from ...trainer.model.attention_backend import (
    CPU_ATTENTION,
    AttentionShape,
    GpuCapabilities,
    SelectedAttention,
    select_attention,
)
from ...trainer.model.config import ModelConfig

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class GenerationRequest:
    """Options of the verb."""

    checkpoint_path: Path
    """Run directory or checkpoint."""
    step: int | None
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    use_mtp_draft: bool
    ema_weights: bool
    """True: use the EMA of the weights."""

    def validate(self) -> None:
        """Raise `ConfigError` with every problem of the options."""
        problems = []
        if not self.prompt:
            problems.append(Problem("--prompt", self.prompt, "must not be empty"))
        if self.max_new_tokens < 1:
            problems.append(Problem("--tokens", self.max_new_tokens, "must be at least 1"))
        if not 0 <= self.temperature < math.inf:
            hint = "must be finite and at least 0 (greedy)"
            problems.append(Problem("--temperature", self.temperature, hint))
        raise_if_any(problems)


def generate_text(request: GenerationRequest) -> tuple[str, Continuation]:
    """Return the continuation of the prompt as text, with its counts. Raises `ConfigError`."""
    request.validate()
    checkpoint = find_checkpoint(request.checkpoint_path, request.step)
    if request.ema_weights:
        checkpoint = checkpoint.with_ema_weights()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = checkpoint.config_value("training", "sequence_length", default=4096)
    try:
        tokenizer, stop = load_tokenizer(checkpoint)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        chunk = load_chunk_for_inference(
            checkpoint, device, dtype, _attention(checkpoint.model_config, context, dtype, device)
        )
    except CheckpointDamaged as damaged:
        raise ConfigError([Problem("checkpoint", str(damaged), "is damaged; choose another with --step")]) from damaged
    sampler = TokenSampler(torch.Generator().manual_seed(request.seed), request.temperature)
    with config_error_context(checkpoint.path / TOKENIZER_FILE, "take another checkpoint"):
        prompt = encode_with_bpe(tokenizer, request.prompt)
    if not prompt or max(prompt) >= checkpoint.model_config.vocab_size:
        limit = checkpoint.model_config.vocab_size
        hint = f"there must be at least one token id, and all must be below vocab_size {limit}"
        raise ConfigError([Problem("--prompt", request.prompt, f"{TOKENIZER_FILE} gives {prompt[:8]}: {hint}")])
    try:
        found = generate_speculatively(
            chunk,
            prompt,
            request.max_new_tokens,
            context,
            sampler,
            stop_token_id=stop,
            use_drafts=request.use_mtp_draft,
        )
    except NonFiniteLogits as error:
        hint = f"{error}; take another checkpoint, or correct its model's values (such as routed_scaling and yarn)"
        raise ConfigError([Problem("checkpoint", str(checkpoint.path), hint)]) from error
    with config_error_context(checkpoint.path / TOKENIZER_FILE, "take another checkpoint"):
        return decode_with_bpe(tokenizer, found.tokens), found


def _attention(model: ModelConfig, context: int, dtype: torch.dtype, device: torch.device) -> SelectedAttention:
    """Select the attention backend for one text of up to `context` tokens. Raises `ConfigError`."""
    if device.type == "cpu":
        return CPU_ATTENTION
    case = AttentionShape(1, model.num_attention_heads, context, model.qk_head_dim, model.v_head_dim, dtype)
    return select_attention("auto", case, GpuCapabilities.detect())


def describe_acceptance(found: Continuation) -> str:
    """Describe the speed-up by accepted drafts in words."""
    rate = f"{len(found.tokens) / found.num_forwards:.2f} tokens per forward" if found.num_forwards else "no forward"
    counts = f"{len(found.tokens)} tokens in {found.num_forwards} forwards, {rate}"
    if not found.num_drafted:
        return f"{counts}; nothing was drafted"
    share = f"{found.num_accepted / found.num_drafted:.1%}"
    return f"{counts}; MTP drafted {found.num_drafted} tokens, {found.num_accepted} accepted: acceptance rate {share}"


def load_tokenizer(checkpoint: Checkpoint) -> tuple[tokenizers.Tokenizer, int | None]:
    """Return a checkpoint's tokenizer and its end token: Shoestring's, or that of an imported config.json."""
    if TOKENIZER_FILE not in {entry.file for entry in checkpoint.manifest.attachments}:
        raise ConfigError(
            [Problem("checkpoint", str(checkpoint.path), f"has no {TOKENIZER_FILE}, so it cannot read a prompt")]
        )
    with config_error_context(checkpoint.path / TOKENIZER_FILE, "take another checkpoint"):
        tokenizer = parse_tokenizer_json(checkpoint.read_attachment(TOKENIZER_FILE))
    stop = tokenizer.token_to_id(END_TOKEN)
    if stop is None:
        named = (checkpoint.imported_config or {}).get("eos_token_id")
        stop = named if type(named) is int else None
    return tokenizer, stop
