"""`shoestring generate`: text from a checkpoint, with speculative decoding by its MTP module."""

from __future__ import annotations

import argparse

from ...comm.errors import raise_if_any
from ...trainer.generation.load import generation_problems, load_model
from ...trainer.generation.speculative_decoding import Continuation
from ..console import print_or_raise, print_to_stderr


def run(options: argparse.Namespace) -> int:
    """Print the prompt with its continuation, and the counts; return the exit code. Raises `ConfigError`."""
    prompt, tokens, temperature = options.prompt, options.tokens, options.temperature
    raise_if_any(generation_problems(prompt, tokens, temperature))  # before the weights are read
    model = load_model(options.path, step=options.step, ema_weights=options.average)
    found = model.generate(
        prompt, tokens, temperature=temperature, seed=options.seed, use_mtp_draft=not options.no_draft
    )
    print_or_raise(prompt + model.decode(found.tokens))
    print_to_stderr(describe_acceptance(found))
    return 0


def describe_acceptance(found: Continuation) -> str:
    """Describe the speed-up by accepted drafts in words."""
    rate = f"{len(found.tokens) / found.num_forwards:.2f} tokens per forward" if found.num_forwards else "no forward"
    counts = f"{len(found.tokens)} tokens in {found.num_forwards} forwards, {rate}"
    if not found.num_drafted:
        return f"{counts}; nothing was drafted"
    share = f"{found.num_accepted / found.num_drafted:.1%}"
    return f"{counts}; MTP drafted {found.num_drafted} tokens, {found.num_accepted} accepted: acceptance rate {share}"
