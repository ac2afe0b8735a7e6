"""The `shoestring` command and its verbs."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module

from .. import __version__
from ..comm.errors import ConfigError
from ..comm.files.file_io import os_error_to_problem
from .answers.options import add_answer_options, print_answer
from .console import INVALID_CONFIGURATION, open_standard_streams, print_config_error, print_to_stderr
from .run.signals import StoppedBeforeStart, die_with_launcher, raise_on_early_stop
from .run.torchrun import RanksFailed

EXIT_FAILURE, EXIT_CONFIG_ERROR, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 128 + signal.SIGINT

_VERBS_THAT_START = ("train", "cluster", "rehearse", "calibrate", "bench")
# Verb: its module, which is imported only for that verb, and its help. In the order of `shoestring -h`. A module has
# `add_arguments(parser)`, and `run(options)` or `answer(options)`, which is printed as --format says; an action may
# have an answer of its own.
_VERBS = {
    "train": ("run.train", "train a model; resumes from the run's last checkpoint if there is one"),
    "cluster": ("cluster.verb", "train on simulated nodes: network namespaces on this machine"),
    "params": ("verbs.params", "parameters, FLOPs per token and activations of a model"),
    "memory": ("verbs.memory", "memory of each rank of a run, by kind"),
    "schedule": ("verbs.schedule", "check and draw a pipeline program"),
    "partition": ("verbs.partition", "layers, parameters and FLOPs of each pipeline stage"),
    "simulate": ("verbs.simulate", "forecast step time, memory and cost of one layout"),
    "plan": ("verbs.plan", "search the fastest layouts, with their cost against the budget"),
    "calibrate": ("verbs.calibrate", "measure this machine for the planner, and write it as a cluster"),
    "rehearse": (
        "rehearsal.verb",
        "run one step of a GPU run's real code on fake CUDA tensors; needs no GPU and no data",
    ),
    "doctor": ("verbs.doctor", "which implementation runs each operation on this machine"),
    "bench": ("bench.verb", "benchmark a part of this machine"),
    "budget": ("verbs.budget", "cost of a run, compared with DeepSeek-V3's 2.788 M GPU-hours"),
    "report": ("verbs.report", "report of a run: loss, cost, timeline, incidents"),
    "watch": ("report.watch", "live view of a run in the terminal, until it ends or Ctrl-C"),
    "dashboard": ("verbs.dashboard", "print the wandb workspace for a run's metrics as JSON"),
    "trace": ("verbs.trace", "time per term of a traced run, and a picture of its timeline"),
    "checkpoint": ("verbs.checkpoint", "list, verify and compare checkpoints"),
    "import": ("verbs.import_weights", "create a checkpoint from Hugging Face weights (DeepseekV3ForCausalLM)"),
    "export": ("verbs.export_weights", "write a checkpoint as a Hugging Face directory (transformers, vLLM)"),
    "generate": ("verbs.generate", "generate text from a checkpoint, with MTP as draft model"),
    "data": ("data.verb", "prepare a corpus; inspect, preview or tokenize"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb and exit with its code; 2 for invalid input, with one line per problem.

    Ctrl-C ends a verb with 130. A stop signal before `train` has started a rank ends it with 75, as any preemption.
    """
    die_with_launcher()
    open_standard_streams()
    options = parse_arguments(arguments)

    def run() -> int:
        with raise_on_early_stop() if options.verb == "train" else nullcontext():
            code: int = options.run(options)
            return code

    sys.exit(exit_code(f"shoestring {options.verb}", _error_heading(options), run))


def exit_code(program: str, heading: str, run: Callable[[], int]) -> int:
    """Return what `run` returns, or the code of its error, which is printed; `heading` precedes invalid input."""
    try:
        return run()
    except StoppedBeforeStart as stopped:
        print_to_stderr(f"{program}: {stopped}")
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut the end short, with a traceback
        print_to_stderr(f"{program}: stopped by SIGINT")
        return EXIT_INTERRUPTED
    except ConfigError as error:
        print_config_error(program, heading, error)
        return EXIT_CONFIG_ERROR
    except BrokenPipeError:
        raise  # the reader of the output has closed it: no file is at fault
    except OSError as error:
        problem = os_error_to_problem(error, "a file that the system does not name", "nothing more was done")
        print_to_stderr(f"{program}: error\n  {problem}")
        return EXIT_CONFIG_ERROR
    except RanksFailed as failed:
        print_to_stderr(f"{program}: {failed}")
        return EXIT_FAILURE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may come before, between and after options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(next((text for text in arguments if not text.startswith("-")), None))
    # argparse fills a list of positionals once, with those before the next option, and has no intermixed parsing for
    # subcommands: the arguments that it does not know are overrides too.
    options, unknown = parser.parse_known_args(arguments)
    unknown = [text for text in unknown if text != "--"]
    if unknown and ("overrides" not in options or any(text.startswith("-") for text in unknown)):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unknown:
        options.overrides = [*options.overrides, *unknown]
    return options


def _error_heading(options: argparse.Namespace) -> str:
    """Return the first line of an error; verbs that start processes say that they have started none."""
    if options.verb in _VERBS_THAT_START or (options.verb == "memory" and options.measure):
        return INVALID_CONFIGURATION
    return "error"


def _print_answer(options: argparse.Namespace) -> int:
    return print_answer(options, options.answer(options))


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """Return the parser of all verbs, with the options of the one that is asked for."""
    parser = argparse.ArgumentParser(
        prog="shoestring", description="Pretrain a mixture-of-experts model inside a GPU-hour budget."
    )
    parser.add_argument("--version", action="version", version=f"shoestring {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (path, text) in _VERBS.items():
        verb = verbs.add_parser(name, help=text)
        if name == asked:
            module = import_module(f".{path}", __package__)
            module.add_arguments(verb)
            verb.set_defaults(run=getattr(module, "run", _print_answer))
            if hasattr(module, "answer"):
                add_answer_options(verb)
                verb.set_defaults(answer=module.answer)
    return parser


if __name__ == "__main__":
    main()
