"""`shoestring generate`: text from a checkpoint, with speculative decoding by its MTP module."""

import argparse

from ...comm.errors import raise_if_any
from ...trainer.generation.load import generation_problems, load_model
from ...trainer.generation.speculative_decoding import Continuation
from ..answers.blocks import Answer, PageSection, PreformattedText
from ..answers.options import add_answer_options, print_answer
from ..console import print_to_stderr
from .checkpoint import add_checkpoint_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_checkpoint_arguments(parser, with_average=True)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="most new tokens (default 100)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="sampling temperature; 0 is greedy (default 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="sampling seed (default 0)")
    parser.add_argument("--no-draft", action="store_true", help="one token per forward, without MTP drafts")
    add_answer_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the prompt with its continuation on standard output, and the counts on standard error."""
    answer = generate_answer(options)
    code = print_answer(options, answer)
    for line in answer.header_lines:
        print_to_stderr(line)
    return code


def generate_answer(options: argparse.Namespace) -> Answer:
    """Return the prompt with its continuation; the counts stand in the header. Raises `ConfigError`."""
    prompt, tokens, temperature = options.prompt, options.tokens, options.temperature
    raise_if_any(generation_problems(prompt, tokens, temperature))  # before the weights are read
    model = load_model(options.path, step=options.step, ema_weights=options.average)
    found = model.generate(
        prompt, tokens, temperature=temperature, seed=options.seed, use_mtp_draft=not options.no_draft
    )
    text = prompt + model.decode(found.tokens)
    data = {
        "text": text,
        "prompt": prompt,
        "tokens": len(found.tokens),
        "forwards": found.num_forwards,
        "tokens_per_forward": len(found.tokens) / found.num_forwards if found.num_forwards else None,
        "drafted": found.num_drafted,
        "accepted": found.num_accepted,
        "acceptance_rate": found.num_accepted / found.num_drafted if found.num_drafted else None,
    }
    sections = [PageSection("", "", [PreformattedText("", text)])]
    return Answer(f"Text of {options.path}", data, sections, header_lines=[describe_acceptance(found)])


def describe_acceptance(found: Continuation) -> str:
    """Describe the speed-up by accepted drafts in words."""
    rate = f"{len(found.tokens) / found.num_forwards:.2f} tokens per forward" if found.num_forwards else "no forward"
    counts = f"{len(found.tokens)} tokens in {found.num_forwards} forwards, {rate}"
    if not found.num_drafted:
        return f"{counts}; nothing was drafted"
    share = f"{found.num_accepted / found.num_drafted:.1%}"
    return f"{counts}; MTP drafted {found.num_drafted} tokens, {found.num_accepted} accepted: acceptance rate {share}"
