"""`shoestring checkpoint`: list, verify and compare checkpoints."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ...comm.units import format_mega
from ..answers.blocks import Answer, Block, PreformattedText, records_table
from ..answers.options import add_answer_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's actions with their options."""
    actions = parser.add_subparsers(dest="action", required=True)

    def add_action(name: str, text: str, answer: Callable[[argparse.Namespace], Answer]) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text)
        action.set_defaults(answer=answer)
        add_checkpoint_arguments(action, with_step=name != "ls")
        add_answer_options(action)
        return action

    add_action("ls", "list the checkpoints of a run", list_answer)
    words = "read every byte of a checkpoint and check its hashes; exit code 1 if it is damaged"
    add_action("verify", words, verify_answer)
    diff = add_action("diff", "compare two checkpoints; exit code 1 if they differ", diff_answer)
    diff.add_argument("other", type=Path, metavar="RUN", help="run or checkpoint to compare with")
    diff.add_argument("--other-step", type=int, metavar="N", help="step of the second checkpoint (default: the newest)")


def add_checkpoint_arguments(
    parser: argparse.ArgumentParser, *, with_step: bool = True, with_average: bool = False
) -> None:
    """Add the run or checkpoint that a verb reads, and the options that choose its step and its EMA."""
    parser.add_argument("path", type=Path, metavar="RUN", help="run directory, or one checkpoint")
    if with_step:
        parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    if with_average:
        text = "use the EMA of the weights (optimizer.ema_decay)"
        parser.add_argument("--average", action="store_true", help=text)


def list_answer(options: argparse.Namespace) -> Answer:
    """Return the checkpoints of a run, with a line below the table for each that is not complete."""
    from ...trainer.checkpoint.inspect import list_checkpoints

    found = [asdict(each) for each in list_checkpoints(options.path)]
    headings = {"name": "checkpoint", "tensors": "tensors", "bytes": "MB", "layout": "saved with layout"}
    formats = {"bytes": lambda size: format_mega(size, 1)}
    # Not in a column: there a reason breaks over many lines.
    reasons = [PreformattedText("", f"{each['name']}: {each['reason']}") for each in found if each["reason"]]
    blocks: list[Block] = [records_table("", headings | {"state": "state"}, found, formats), *reasons]
    return Answer.from_blocks(f"Checkpoints of {options.path}", found, blocks)


def verify_answer(options: argparse.Namespace) -> Answer:
    """Return the damage of a checkpoint; exit code 1 if there is any."""
    from ...trainer.checkpoint.inspect import verify_checkpoint

    found = verify_checkpoint(options.path, options.step)
    sizes = f"{found.tensors:,} tensors, {found.bytes:,} bytes" if found.bytes is not None else ""
    words = "\n".join(found.damage) or f"{found.path}: {sizes}, all hashes and headers are correct"
    blocks, code = [PreformattedText("", words)], 1 if found.damage else 0
    return Answer.from_blocks(f"Verification of {options.path}", asdict(found), blocks, exit_code=code)


def diff_answer(options: argparse.Namespace) -> Answer:
    """Return the differences of two checkpoints; exit code 1 if their tensors differ."""
    from ...trainer.checkpoint.inspect import diff_checkpoints

    metadata, found = diff_checkpoints(options.path, options.other, (options.step, options.other_step))
    tensors = [asdict(each) for each in found]
    headings = {
        "kind": "state",
        "tensors": "common",
        "equal": "equal",
        "only_first": "only 1st",
        "only_second": "only 2nd",
        "reshaped": "shape/dtype differs",
        "largest": "max |Δ|",
        "where": "tensor",
    }
    blocks: list[Block] = [PreformattedText("", "\n".join(metadata))] * bool(metadata)
    blocks.append(records_table("", headings, tensors, {"largest": "{:.3g}".format}))
    data, code = {"metadata": metadata, "tensors": tensors}, 0 if all(each.is_equal for each in found) else 1
    return Answer.from_blocks(f"{options.path} and {options.other}", data, blocks, exit_code=code)
