"""Training loop: step, evaluate and checkpoint until the tokens are consumed."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..comm.errors import CollectiveError
from ..comm.groups import ProcessGroups
from .build import RankResources, build_rank_resources
from .checkpoint.saver import SaveResult
from .checkpoint.store import CheckpointStore
from .config import RunConfig
from .costs.cluster import measure_peak_tflops
from .data.samples import StepPrefetcher, TokenBatch
from .data.shard_files import DataChanged
from .generation.generate import generate
from .run.checkpointing import (
    begin_save,
    finish_save,
    load_latest_checkpoint,
    poll_save,
    remove_partial_saves,
    reserve_save_memory,
)
from .run.evaluate import evaluate_validation_loss, read_evaluated_step
from .run.exit import (
    HaltReason,
    RankFailed,
    RunFailed,
    RunHalted,
    all_reduce_halt_reason,
    decide_halt_reason,
    never_stop,
)
from .run.null_reporter import NullReporter
from .run.profiling import StepProfiler
from .run.reporter import Reporter
from .run.step import NonFiniteStep, StepSettings


def train(
    config: RunConfig,
    groups: ProcessGroups,
    device: torch.device,
    attempt: str,
    stop_requested: Callable[[], bool] = never_stop,
) -> int:
    """Train until the end, resuming from the run directory's last checkpoint; return the number of steps done.

    Collective over all ranks. `attempt` names the launch in the ledger. Every rank calls `stop_requested` once per
    step, before each group of micro-batches of an evaluation, and after each token of the sample.

    Raises `ConfigError` for a checkpoint that does not fit, `RunFailed` for a loss that is not finite or for repeated
    failed saves, `RunHalted` when any rank was asked to stop or the budget is used up, `RankFailed` or `DataChanged`
    for a fault of this rank, and `CollectiveError` for a peer that has died or does not respond. After an error the
    process must exit: communication may be in flight that never completes.
    """
    run_dir = Path(config.training.run_dir)
    reporter = Reporter(config, run_dir, attempt) if groups.world.is_first_rank else NullReporter()
    rank = build_rank_resources(config, groups, device)
    done = 0
    try:
        if groups.world.is_first_rank:
            remove_partial_saves(rank.checkpoint_store)
        began, evaluation_pending = _start(rank, reporter)
        done = began
        _halt_before_training(rank, done, reporter, stop_requested)
        if evaluation_pending and not _evaluate(rank, done, reporter, stop_requested):
            raise _halted(HaltReason.PREEMPTED, f"after step {done}, which is in a checkpoint", None, progressed=False)
        if done < config.total_steps:
            reserve_save_memory(rank)
        tracing = StepProfiler(rank, done)
        reader = StepPrefetcher(partial(_read_micro_batches, rank), config.total_steps)
        for step in range(done + 1, config.total_steps + 1):
            tracing.before_step(step)
            votes = StepVotes(rank, reporter, step, stop_requested)
            seconds = _one_step(rank, step, reader, reporter, votes)
            tracing.after_step(step, seconds, reporter)
            done = step
            poll_save(rank, reporter, votes.ranks_saved, votes.ranks_failed)
            _halt_if_agreed(rank, done, reporter, votes)
            _insist_on_saves(rank, done)
            owes = _is_due(step, config.training.evaluate_every, config.total_steps)
            saves = _is_due(step, config.training.checkpoint_every, config.total_steps)
            # Save before evaluating: an evaluation takes minutes, and a fault in it would cost the steps before it.
            if saves:
                begin_save(rank, step, reporter, evaluation_pending=owes)
            if owes and not _evaluate(rank, step, reporter, stop_requested):
                raise _halted_in_evaluation(rank, step, reporter, saves=saves)
        reader.close()
        _insist(finish_save(rank, reporter))
        if config.training.sample_tokens and not _sample(rank, done, reporter, stop_requested):
            where = f"in the sample after step {done}, which is in a checkpoint"
            raise _halted(HaltReason.PREEMPTED, where, None, progressed=done > began)
    except (CollectiveError, DataChanged, RankFailed, RunFailed, RunHalted) as error:
        reporter.close(done, str(error), clean=isinstance(error, RunHalted))
        raise
    else:
        rank.close()
    reporter.close(done, "done")
    return done


def _start(rank: RankResources, reporter: Reporter) -> tuple[int, bool]:
    """Report the run and load the last checkpoint, if any.

    Returns the steps that it holds, and True if the evaluation due after them was skipped because the run halted.
    """
    config, groups = rank.config, rank.groups
    peak = config.cluster.peak_tflops or measure_peak_tflops(rank.device, rank.dtype, groups.world_cpu)
    attention = str(rank.engine.stepper.model.attention)
    reporter.report_run(peak, str(rank.device), str(rank.dtype).removeprefix("torch."), attention)
    metadata = load_latest_checkpoint(rank, reporter)
    done, evaluation_pending = 0, False
    if metadata is not None:
        done = metadata["step"]
        evaluation_pending = metadata["evaluation_pending"] and not _is_evaluated(rank, done)
        reporter.report_resume(done, metadata["ledger"])
    else:
        reporter.report_first_start()
    reporter.begin_training()
    return done, evaluation_pending


def _is_evaluated(rank: RankResources, done: int) -> bool:
    """Return True if rank 0 recorded the evaluation after `done` steps later than the checkpoint. Collective."""
    until = read_evaluated_step(Path(rank.config.training.run_dir))
    first: int = rank.groups.world_cpu.all_gather_objects(until, "last evaluated step")[0]
    return first >= done


class StepVotes:
    """Votes of this rank in one step, and the number of ranks that voted yes on each."""

    def __init__(self, rank: RankResources, reporter: Reporter, step: int, stop_asked: Callable[[], bool]) -> None:
        self._rank, self._reporter, self._step, self._stop_asked = rank, reporter, step, stop_asked
        self.over_budget_reason: str | None = None
        """Reason to halt because the budget is used up; only the first rank knows it."""
        self.halt: HaltReason | None = None
        self.ranks_saved = self.ranks_failed = 0
        """Numbers of ranks whose part of the current save is written, and whose part has failed."""

    def collect_local_votes(self) -> tuple[bool, ...]:
        """Return this rank's votes; called shortly before the end of the step."""
        self.over_budget_reason = self._reporter.budget_halt_reason(self._step)
        return self._stop_asked(), self.over_budget_reason is not None, *self._rank.checkpoint_saver.save_votes()

    def set_global_counts(self, counts: Sequence[int]) -> None:
        """Set the number of yes votes over all ranks."""
        asked, over_budget, self.ranks_saved, self.ranks_failed = counts
        self.halt = decide_halt_reason(asked, over_budget)


def _halt_before_training(rank: RankResources, done: int, reporter: Reporter, stop_asked: Callable[[], bool]) -> None:
    """Raise `RunHalted` on all ranks if any has a reason and training is not complete; `done` steps are saved."""
    if done == rank.config.total_steps:
        return
    spent = reporter.budget_halt_reason(done)
    halt = all_reduce_halt_reason(rank.groups.world_cpu, stop_requested=stop_asked(), over_budget=spent is not None)
    if halt is not None:
        where = f"after step {done}, which is in a checkpoint" if done else "before the first step"
        raise _halted(halt, where, spent, progressed=False)


def _halt_if_agreed(rank: RankResources, done: int, reporter: Reporter, votes: StepVotes) -> None:
    """Save after `done` steps and raise `RunHalted` on all ranks if any voted to halt, unless training is complete."""
    # A stop has `stop_seconds` and no time for an evaluation: one that is due runs when the run is resumed.
    config = rank.config
    if done == config.total_steps or votes.halt is None:
        return
    owes = _is_due(done, config.training.evaluate_every, config.total_steps)
    begin_save(rank, done, reporter, evaluation_pending=owes)
    raise _halted(votes.halt, _where(done, finish_save(rank, reporter)), votes.over_budget_reason, progressed=True)


def _halted_in_evaluation(rank: RankResources, done: int, reporter: Reporter, *, saves: bool) -> RunHalted:
    """Save the `done` steps and return the halt of a run whose evaluation after them was interrupted.

    `saves`: a checkpoint was due after this step, and its save began before the evaluation.
    """
    if not saves:
        begin_save(rank, done, reporter, evaluation_pending=True)
    where = _where(done, finish_save(rank, reporter))
    return _halted(HaltReason.PREEMPTED, f"in the evaluation {where}", None, progressed=True)


def _where(done: int, saved: SaveResult | None) -> str:
    if saved is None or saved.failure is not None:
        return f"after step {done}, whose checkpoint could not be written"
    return f"after step {done}, which is in a checkpoint"


def _halted(halt: HaltReason, where: str, spent: str | None, *, progressed: bool) -> RunHalted:
    reason = "a stop was requested; the same command continues the run" if halt == HaltReason.PREEMPTED else spent
    return RunHalted(halt, f"stopped {where}: {reason}", made_progress=progressed)


def _one_step(
    rank: RankResources, step: int, reader: StepPrefetcher[list[TokenBatch]], reporter: Reporter, votes: StepVotes
) -> float:
    """Run step number `step`, from 1; return its seconds without loading the samples.

    Raises `RunFailed` for a loss or gradient that is not finite.
    """
    config = rank.config
    with reporter.charge_time("data_stall"):
        micro_batches = [batch.to(rank.device) for batch in reader.take(step)]
    settings = StepSettings.at_step(config, step)
    rank.engine.exchange_traffic.reset()
    start = time.perf_counter()
    try:
        result = rank.engine.stepper.step(
            micro_batches, config.batch_ramp.batch_size(step), settings, votes.collect_local_votes
        )
    except NonFiniteStep as error:
        reporter.report_skipped_step(step, time.perf_counter() - start)
        finish_save(rank, reporter)
        last = rank.checkpoint_store.steps()
        hope = f"the last checkpoint is step {last[-1]}" if last else "there is no checkpoint yet"
        hint = "Lower optimizer.peak_learning_rate or lengthen its warm-up."
        raise RunFailed(f"step {step}: {error}; {hope}. {hint}") from error
    seconds = time.perf_counter() - start
    votes.set_global_counts(result.totals.vote_counts)
    between_replicas = rank.engine.stepper.optimizer.reducer.traffic
    reporter.report_step(step, result, settings, seconds, rank.engine.exchange_traffic, between_replicas)
    return seconds


def _read_micro_batches(rank: RankResources, step: int) -> list[TokenBatch]:
    """Return this rank's micro-batches of step number `step`, in host memory."""
    # Each round of micro-batches over the ranks takes neighboring samples, so the global batch of a step is the same
    # for every number of ranks.
    config, batches = rank.config, rank.config.batch_ramp
    size = config.schedule.micro_batch_size
    first = batches.consumed_samples(step - 1) + config.topology.dp_rank(rank.groups.rank) * size
    return [
        rank.train_samples.read_batch(rank.sample_order.sample_indices(start, size).tolist())
        for start in range(first, first + batches.batch_size(step), config.global_micro_batch_size)
    ]


def _evaluate(rank: RankResources, step: int, reporter: Reporter, stop_asked: Callable[[], bool]) -> bool:
    """Report the validation loss after `step` steps; return False if a stop request interrupted it."""
    rank.engine.stepper.optimizer.wait_for_weights()
    average, averaged = rank.engine.stepper.ema, None
    with reporter.charge_time("evaluation"):
        plain = _validation_loss(rank, stop_asked)
        if average is not None and plain is not None:
            with average.swapped_into_model():
                averaged = _validation_loss(rank, stop_asked)
    if plain is None or (average is not None and averaged is None):
        return False
    mean = None if averaged is None else averaged[0]
    reporter.report_evaluation(step, plain[0], mean, plain[1], rank.unigram_entropy)
    return True


def _validation_loss(rank: RankResources, stop_asked: Callable[[], bool]) -> tuple[float, int] | None:
    """Return the validation loss and its number of targets; None if a stop request interrupted it."""
    stepper, size = rank.engine.stepper, rank.config.schedule.micro_batch_size
    forwards, device = rank.engine.pipeline.build_forward_executor, rank.device
    return evaluate_validation_loss(
        stepper.chunks, forwards, rank.validation_samples, size, rank.groups, device, stop_asked
    )


def _sample(rank: RankResources, step: int, reporter: Reporter, stop_asked: Callable[[], bool]) -> bool:
    """Report generated text after `step` steps; return False if a stop request interrupted it."""
    rank.engine.stepper.optimizer.wait_for_weights()
    training, tokenizer = rank.config.training, rank.tokenizer
    with reporter.charge_time("evaluation"):
        prompt = tokenizer.encode(training.sample_prompt)
        continuation = generate(
            rank.engine.stepper.chunks,
            rank.engine.pipeline.build_forward_executor(1),
            prompt,
            training.sample_tokens,
            training.sequence_length,
            rank.groups,
            rank.device,
            seed=training.seed,
            stop_token_id=tokenizer.eos_token_id,
            stop_requested=stop_asked,
        )
    if continuation is None:
        return False
    reporter.report_sample(step, training.sample_prompt, tokenizer.decode(continuation))
    return True


def _insist(last: SaveResult | None) -> None:
    """Raise `RunFailed` if the last checkpoint of the run could not be written."""
    if last is not None and last.failure is not None:
        whole = CheckpointStore(last.path.parent, keep_last=1).steps()
        begin = f"continues from step {whole[-1]}" if whole else "starts from the beginning"
        hint = f"make room; the same command {begin}"
        raise RunFailed(f"the last checkpoint, of step {last.step}, could not be written: {last.failure}; {hint}")


def _insist_on_saves(rank: RankResources, done: int) -> None:
    """Raise `RunFailed` on all ranks after too many consecutive failed saves; `done` steps are trained."""
    failed = rank.config.training.max_failed_saves
    if not rank.checkpoint_saver.has_failed_repeatedly(failed):
        return
    last = rank.checkpoint_store.steps()
    where = f"continues from step {last[-1]}, the last one saved" if last else "starts over: there is no checkpoint"
    hint = f"make room; the same command {where}"
    raise RunFailed(
        f"{failed} saves in a row have failed (training.max_failed_saves = {failed}), the last by step {done}; {hint}"
    )


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
