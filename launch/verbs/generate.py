"""`shoestring generate`: text from a checkpoint, with its MTP module as a draft."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

from ...comm.errors import ConfigError, Problem, refuse_if_any
from ...comm.files.access import refusing
from ...trainer.checkpoint.find import find_checkpoint
from ...trainer.checkpoint.manifest import Damaged
from ...trainer.checkpoint.opened import Checkpoint
from ...trainer.data.tokenizer import END, decode_with, encode_with, read_bpe
from ...trainer.generation.load import load_chunk
from ...trainer.generation.speculate import Continuation, NotFinite, Sampler, speculate
from ...trainer.model.attention_backend import ON_CPU, AttentionCase, AttentionChoice, GpuFacts, choose_attention
from ...trainer.model.config import ModelConfig

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked for."""

    path: Path
    """A run, or one checkpoint."""
    step: int | None
    prompt: str
    tokens: int
    temperature: float
    seed: int
    draft: bool
    average: bool
    """Of the weights, instead of the weights."""

    def check(self) -> None:
        """Raises `ConfigError`."""
        problems = []
        if not self.prompt:
            problems.append(Problem("--prompt", self.prompt, "must hold text"))
        if self.tokens < 1:
            problems.append(Problem("--tokens", self.tokens, "must be at least 1"))
        if not 0 <= self.temperature < math.inf:
            hint = "must be at least 0, which takes the likeliest, and finite"
            problems.append(Problem("--temperature", self.temperature, hint))
        refuse_if_any(problems)


def generate_text(request: GenerationRequest) -> tuple[str, Continuation]:
    """The continuation of the prompt, as text and with its counts. Raises `ConfigError`."""
    request.check()
    checkpoint = find_checkpoint(request.path, request.step)
    if request.average:
        checkpoint = checkpoint.averaged()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = checkpoint.setting("training", "sequence_length", default=4096)
    try:
        tokenizer, stop = open_tokenizer(checkpoint)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        chunk = load_chunk(checkpoint, device, dtype, _attention(checkpoint.model, context, dtype, device))
    except Damaged as damaged:
        raise ConfigError([Problem("checkpoint", str(damaged), "is damaged; --step takes another")]) from damaged
    sampler = Sampler(torch.Generator().manual_seed(request.seed), request.temperature)
    with refusing(checkpoint.path / TOKENIZER, "take another checkpoint"):
        prompt = encode_with(tokenizer, request.prompt)
    if not prompt or max(prompt) >= checkpoint.model.vocab_size:
        hint = (
            f"its tokens must be numbers below {checkpoint.model.vocab_size}, the model's vocabulary, and at least one"
        )
        raise ConfigError([Problem("--prompt", request.prompt, f"{TOKENIZER} gives {prompt[:8]}: {hint}")])
    try:
        found = speculate(chunk, prompt, request.tokens, context, sampler, stop=stop, draft=request.draft)
    except NotFinite as error:
        hint = f"{error}; take another checkpoint, or correct its model's values (such as routed_scaling and yarn)"
        raise ConfigError([Problem("checkpoint", str(checkpoint.path), hint)]) from error
    with refusing(checkpoint.path / TOKENIZER, "take another checkpoint"):
        return decode_with(tokenizer, found.tokens), found


def _attention(model: ModelConfig, context: int, dtype: torch.dtype, device: torch.device) -> AttentionChoice:
    """What computes up to `context` tokens of one text. Raises `ConfigError`."""
    if device.type == "cpu":
        return ON_CPU
    case = AttentionCase(1, model.num_attention_heads, context, model.qk_head_dim, model.v_head_dim, dtype)
    return choose_attention("auto", case, GpuFacts.here())


def acceptance(found: Continuation) -> str:
    """How the drafts did, in words."""
    rate = f"{len(found.tokens) / found.forwards:.2f} tokens a forward" if found.forwards else "no forward"
    counts = f"{len(found.tokens)} tokens in {found.forwards} forwards, {rate}"
    if not found.drafted:
        return f"{counts}; nothing was drafted"
    share = f"{found.accepted / found.drafted:.1%}"
    return f"{counts}; MTP drafted {found.drafted} tokens, {found.accepted} accepted: acceptance rate {share}"


def open_tokenizer(checkpoint: Checkpoint) -> tuple[tokenizers.Tokenizer, int | None]:
    """The tokenizer in a checkpoint, and the token that ends a text: ours, or what an imported config.json names."""
    if TOKENIZER not in {entry.file for entry in checkpoint.manifest.attachments}:
        raise ConfigError(
            [Problem("checkpoint", str(checkpoint.path), f"has no {TOKENIZER}, so it cannot read a prompt")]
        )
    with refusing(checkpoint.path / TOKENIZER, "take another checkpoint"):
        tokenizer = read_bpe(checkpoint.attachment(TOKENIZER))
    stop = tokenizer.token_to_id(END)
    if stop is None:
        named = (checkpoint.source or {}).get("eos_token_id")
        stop = named if type(named) is int else None
    return tokenizer, stop
