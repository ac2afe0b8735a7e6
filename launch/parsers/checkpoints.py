"""Verbs about checkpoints: `checkpoint`, `import`, `export`, `generate`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from .options import Subparsers, add_format_option, add_subcommands, print_result


def add_commands(verbs: Subparsers) -> None:
    """Add this family's verbs."""
    actions = add_subcommands(verbs.add_parser("checkpoint", help="list, verify and compare checkpoints"))
    _add_list(actions)
    _add_verify(actions)
    _add_diff(actions)
    _add_import(verbs)
    _add_export(verbs)
    _add_generate(verbs)


def _add_list(actions: Subparsers) -> None:
    listing = actions.add_parser("ls", help="list the checkpoints of a run")
    _add_path(listing)
    add_format_option(listing)
    listing.set_defaults(run=_list)


def _list(options: argparse.Namespace) -> int:
    from ..verbs.checkpoint import checkpoints_table, list_checkpoints

    listed = list_checkpoints(options.path)
    print_result(options, lambda: checkpoints_table(listed), lambda: [asdict(each) for each in listed])
    return 0


def _add_verify(actions: Subparsers) -> None:
    words = "read every byte of a checkpoint and check its hashes; exit code 1 if it is damaged"
    verify_checkpoint = actions.add_parser("verify", help=words)
    _add_path(verify_checkpoint)
    add_format_option(verify_checkpoint)
    _add_step(verify_checkpoint)
    verify_checkpoint.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from ..verbs.checkpoint import verify_checkpoint

    found = verify_checkpoint(options.path, options.step)
    print_result(options, lambda: found.report_text, lambda: asdict(found))
    return 1 if found.damage else 0


def _add_diff(actions: Subparsers) -> None:
    diff_checkpoints = actions.add_parser("diff", help="compare two checkpoints; exit code 1 if they differ")
    _add_path(diff_checkpoints)
    add_format_option(diff_checkpoints)
    diff_checkpoints.add_argument("other", type=Path, metavar="RUN", help="run or checkpoint to compare with")
    diff_checkpoints.add_argument(
        "--other-step", type=int, metavar="N", help="step of the second checkpoint (default: the newest)"
    )
    _add_step(diff_checkpoints)
    diff_checkpoints.set_defaults(run=_diff)


def _diff(options: argparse.Namespace) -> int:
    from ..console import print_or_raise
    from ..verbs.checkpoint import diff_checkpoints, diff_table

    metadata, differences = diff_checkpoints(options.path, options.other, (options.step, options.other_step))
    if options.format == "table":
        print_or_raise("\n".join(metadata))
    tree = {"metadata": metadata, "tensors": [asdict(each) for each in differences]}
    print_result(options, lambda: diff_table(differences), lambda: tree)
    same = all(each.equal == each.tensors and not each.only_first + each.only_second for each in differences)
    return 0 if same else 1


def _add_import(verbs: Subparsers) -> None:
    importing = verbs.add_parser("import", help="create a checkpoint from Hugging Face weights (DeepseekV3ForCausalLM)")
    importing.add_argument(
        "source", type=_named, metavar="DIRECTORY", help="directory with config.json and safetensors files"
    )
    importing.add_argument("target", type=_named, metavar="TARGET", help="directory of the new checkpoint")
    importing.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    from ..console import print_to_stdout
    from ..verbs.convert import import_command

    print_to_stdout(f"Imported to {import_command(options.source, options.target)}")
    return 0


def _add_export(verbs: Subparsers) -> None:
    export = verbs.add_parser("export", help="write a checkpoint as a Hugging Face directory (transformers, vLLM)")
    _add_path(export)
    export.add_argument("directory", type=_named, metavar="DIRECTORY", help="output directory, new or empty")
    export.add_argument(
        "--dtype", choices=["bf16", "fp32", "fp8"], default="bf16", help="format of the weights (default bf16)"
    )
    export.add_argument(
        "--rope",
        choices=["pairs", "halves"],
        default="pairs",
        help="rotary layout: interleaved pairs, as DeepSeek's, or halves (default pairs)",
    )
    export.add_argument("--max-shard", default="5GB", metavar="SIZE", help="largest file (default 5GB)")
    _add_step(export)
    _add_ema_option(export)
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from ..console import print_to_stdout
    from ..verbs.convert import export_command

    how = options.dtype, options.rope, options.max_shard
    found = export_command(options.path, options.step, options.directory, *how, ema_weights=options.average)
    what = "the EMA weights of " if options.average else ""
    print_to_stdout(f"Exported {what}{found} to {options.directory}")
    return 0


def _add_generate(verbs: Subparsers) -> None:
    generate = verbs.add_parser("generate", help="generate text from a checkpoint, with MTP as draft model")
    _add_path(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    generate.add_argument("--tokens", type=int, default=100, metavar="N", help="most new tokens (default 100)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="sampling temperature; 0 is greedy (default 0.8)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="sampling seed (default 0)")
    generate.add_argument("--no-draft", action="store_true", help="one token per forward, without MTP drafts")
    _add_step(generate)
    _add_ema_option(generate)
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    from ..verbs.generate import run

    return run(options)


def _named(text: str) -> Path:
    """Convert an argument to a path; an empty one would mean the working directory and is an error."""
    if not text:
        raise argparse.ArgumentTypeError("must name a directory; it is empty")
    return Path(text)


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN", help="run directory, or one checkpoint")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")


def _add_ema_option(parser: argparse.ArgumentParser) -> None:
    words = "use the EMA of the weights (optimizer.ema_decay)"
    parser.add_argument("--average", action="store_true", help=words)
