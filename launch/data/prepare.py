"""`shoestring data prepare`: tokens of a corpus, by processes of this machine or by jobs of datatrove's executors."""

import argparse
from typing import Any

import yaml

from ...comm.errors import ConfigError, Problem
from ...trainer.checkpoint.tokenizer import find_tokenizer
from ...trainer.config import RunConfig
from ...trainer.data.preparation.prepare import begun_preparation, prepare_corpus
from ...trainer.data.preparation.tasks import plan_tasks
from ..console import print_to_stdout
from ..signal_cleanup import clean_up_on_signal


def prepare(options: argparse.Namespace, config: RunConfig) -> bool:
    """Prepare the data and print progress; return whether they are complete. Raises `ConfigError`."""
    tokenizer = find_tokenizer(config)
    if options.executor is None:
        if options.executor_option or options.jobs != 1:
            raise ConfigError([Problem("--executor", None, "must name an executor for --jobs and --executor-option")])
        with clean_up_on_signal("data prepare", "the same command continues"):
            prepare_corpus(config.data, print_to_stdout, tokenizer=tokenizer)
        return True
    submit = _submitter()
    if options.jobs < 1:
        raise ConfigError([Problem("--jobs", options.jobs, "must be at least 1")])
    arguments = dict(_parse_option(text) for text in options.executor_option)
    with begun_preparation(config.data, print_to_stdout, tokenizer=tokenizer) as (job, files):
        submit(job, plan_tasks(files), options.executor, options.jobs, arguments)
    if options.executor == "slurm":
        print_to_stdout("Submitted. When the jobs have ended, the same command without --executor completes the data.")
        return False
    prepare_corpus(config.data, print_to_stdout, tokenizer=tokenizer)
    return True


def _submitter() -> Any:
    try:
        from ...trainer.data.preparation.datatrove_step import submit_tasks
    except ImportError as error:
        hint = f"needs a package that is not installed ({error}); pip install datatrove"
        raise ConfigError([Problem("--executor", None, hint)]) from error
    return submit_tasks


def _parse_option(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not key.isidentifier() or not sign:
        raise ConfigError([Problem("--executor-option", text, "must be KEY=VALUE")])
    return key, yaml.safe_load(value) if value[:1] in "[{" or value.lstrip("-").isdigit() else value
