"""`shoestring generate`: text from a checkpoint, with speculative decoding by its MTP module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import raise_if_any
from ...trainer.generation.loaded_model import generation_problems, load_model
from ...trainer.generation.speculative_decoding import Continuation


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


def generate_text(request: GenerationRequest) -> tuple[str, Continuation]:
    """Return the continuation of the prompt as text, with its counts. Raises `ConfigError`."""
    raise_if_any(generation_problems(request.prompt, request.max_new_tokens, request.temperature))
    model = load_model(request.checkpoint_path, step=request.step, ema_weights=request.ema_weights)
    found = model.generate(
        request.prompt,
        request.max_new_tokens,
        temperature=request.temperature,
        seed=request.seed,
        use_mtp_draft=request.use_mtp_draft,
    )
    return model.decode(found.tokens), found


def describe_acceptance(found: Continuation) -> str:
    """Describe the speed-up by accepted drafts in words."""
    rate = f"{len(found.tokens) / found.num_forwards:.2f} tokens per forward" if found.num_forwards else "no forward"
    counts = f"{len(found.tokens)} tokens in {found.num_forwards} forwards, {rate}"
    if not found.num_drafted:
        return f"{counts}; nothing was drafted"
    share = f"{found.num_accepted / found.num_drafted:.1%}"
    return f"{counts}; MTP drafted {found.num_drafted} tokens, {found.num_accepted} accepted: acceptance rate {share}"
