"""The training loop: step, evaluate, checkpoint, until the tokens are consumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..comm.failure import CollectiveFailed
from ..comm.groups import ProcessGroups
from ..comm.refusal import refuse_if_any
from .by_tokens import value_at
from .checkpoint.compatible import incompatibilities
from .checkpoint.names import named_state
from .config import RunConfig
from .costs.cluster import measure_peak_tflops
from .costs.flops import count_flops
from .data.batch import TokenBatch
from .evaluate import evaluate
from .generate import generate
from .halt import Halt, RunHalted, agree_to_halt
from .rank import Rank, build_rank
from .reporter import Reporter, Speed
from .step import NonFiniteStep, StepSettings
from .tracing import Tracing


class RunFailed(RuntimeError):  # noqa: N818 -- says what happened
    """The run cannot go on; the message says why and what to do. Raised on every rank."""


def _never() -> bool:
    return False


def train(
    config: RunConfig,
    groups: ProcessGroups,
    device: torch.device,
    attempt: str,
    stop_asked: Callable[[], bool] = _never,
) -> int:
    """Train to the end, going on from the run directory's last checkpoint; return the number of steps done.

    Collective over all ranks. `attempt` names the launch in the ledger; `stop_asked` is looked at once a step, on every
    rank. Raises `Refused` for a checkpoint that does not fit the configuration, `RunFailed` for a loss that is not
    finite, `RunHalted` when any rank was asked to stop or the budget is used up, and `CollectiveFailed` for a peer that
    is gone or silent. After an error communication may be under way that never ends: end the process.
    """
    run_dir = Path(config.training.run_dir)
    reporter = Reporter(config, run_dir, attempt) if groups.world.is_first else None
    rank = build_rank(config, groups, device)
    done = 0
    try:
        done, owes_evaluation = _start(rank, reporter)
        _halt_if_agreed(rank, done, reporter, stop_asked, is_saved=True)
        if owes_evaluation:
            _evaluate(rank, done, reporter)
        tracing = Tracing(rank, done)
        for step in range(done + 1, config.total_steps + 1):
            tracing.before(step)
            seconds = _one_step(rank, step, reporter)
            tracing.after(step, seconds, reporter)
            done = step
            _halt_if_agreed(rank, done, reporter, stop_asked, is_saved=False)
            if _is_due(step, config.training.evaluate_every, config.total_steps):
                _evaluate(rank, step, reporter)
            if _is_due(step, config.training.checkpoint_every, config.total_steps):
                _save(rank, step, reporter)
        if config.training.sample_tokens:
            _sample(rank, done, reporter)
    except NonFiniteStep as error:
        last = rank.store.steps()
        hope = f"the last checkpoint is step {last[-1]}" if last else "there is no checkpoint yet"
        message = f"step {done + 1}: {error}; {hope}. Lower optimizer.peak_learning_rate or lengthen its warm-up."
        if reporter is not None:
            reporter.close(done, message)
        raise RunFailed(message) from error
    except (CollectiveFailed, RunHalted) as error:
        if reporter is not None:
            reporter.close(done, str(error), clean=isinstance(error, RunHalted))
        raise
    else:
        rank.close()
    if reporter is not None:
        reporter.close(done, "done")
    return done


def _start(rank: Rank, reporter: Reporter | None) -> tuple[int, bool]:
    """Announce the run and load the last checkpoint, if any; return the steps it holds.

    And whether an evaluation was due after them that a halt has put off.
    """
    config, groups = rank.config, rank.groups
    peak = config.cluster.peak_tflops or measure_peak_tflops(rank.device, rank.dtype, groups.world)
    if reporter is not None:
        speed = Speed(count_flops(config.model, config.training.sequence_length), peak)
        reporter.run(speed, str(rank.device), str(rank.dtype).removeprefix("torch."))
    steps = rank.store.steps()
    done, owes_evaluation = 0, False
    if steps:
        with _timing(reporter, "checkpoint_load"):
            done = steps[-1]
            facts = _load(rank, done)
        owes_evaluation = facts.get("owes_evaluation", False)
        if reporter is not None:
            reporter.resume(done, facts["ledger"])
    if reporter is not None:
        reporter.ready()
    return done, owes_evaluation


def _halt_if_agreed(
    rank: Rank, done: int, reporter: Reporter | None, stop_asked: Callable[[], bool], *, is_saved: bool
) -> None:
    """After `done` steps, of a run with more to do: raise `RunHalted` on all ranks if any of them has a reason.

    Whoever asks may not wait long: an evaluation that is due comes after the checkpoint, in the run's next life.
    """
    config = rank.config
    if done == config.total_steps:
        return
    spent = None if reporter is None else reporter.must_halt(done)
    halt = agree_to_halt(rank.groups.world, asked=stop_asked(), over_budget=spent is not None)
    if halt is None:
        return
    if not is_saved:
        owes = _is_due(done, config.training.evaluate_every, config.total_steps)
        _save(rank, done, reporter, owes_evaluation=owes)
    where = f"after step {done}, which is in a checkpoint" if done else "before the first step"
    reason = "it was asked to, and the same command goes on" if halt == Halt.PREEMPTED else spent
    raise RunHalted(halt, f"stopped {where}: {reason}")


def _one_step(rank: Rank, step: int, reporter: Reporter | None) -> float:
    """Step number `step`, from 1; return the seconds it took once its samples were there."""
    config = rank.config
    with _timing(reporter, "data_stall"):
        micro_batches = list(_micro_batches(rank, (step - 1) * config.training.global_batch))
    before = (step - 1) * config.tokens_per_step
    settings = StepSettings(
        learning_rate=config.optimizer.learning_rate(step * config.tokens_per_step),
        clip_norm=config.optimizer.clip_norm,
        balance_weight=config.training.balance_weight,
        mtp_weight=value_at(config.training.mtp_weight, before),
        bias_speed=value_at(config.training.bias_speed, before),
    )
    rank.traffic.clear()
    start = time.perf_counter()
    try:
        result = rank.stepper.step(micro_batches, config.training.global_batch, settings)
    except NonFiniteStep:
        if reporter is not None:
            reporter.skipped(step, time.perf_counter() - start)
        raise
    seconds = time.perf_counter() - start
    if reporter is not None:
        reporter.step(step, result, settings, seconds, rank.traffic)
    return seconds


def _micro_batches(rank: Rank, consumed: int) -> Iterator[TokenBatch]:
    """This rank's samples of the global batch that follows `consumed` samples.

    Each round of micro-batches takes neighbouring samples, so what the batch holds depends on no rank count.
    """
    config = rank.config
    size = config.schedule.micro_batch
    first = config.topology.dp_rank(rank.groups.rank) * size
    for index in range(config.micro_batches):
        start = consumed + index * config.topology.dp * size + first
        yield rank.train.batch(rank.order.indices(start, size).tolist()).to(rank.device)


def _evaluate(rank: Rank, step: int, reporter: Reporter | None) -> None:
    with _timing(reporter, "evaluation"):
        loss, targets = evaluate(
            rank.stepper.chunks,
            rank.pipeline.forwards,
            rank.validation,
            rank.config.schedule.micro_batch,
            rank.groups,
            rank.device,
        )
    if reporter is not None:
        reporter.evaluation(step, loss, targets, rank.unigram_entropy)


def _sample(rank: Rank, step: int, reporter: Reporter | None) -> None:
    training, tokenizer = rank.config.training, rank.tokenizer
    with _timing(reporter, "evaluation"):
        prompt = tokenizer.encode(training.sample_prompt)
        continuation = generate(
            rank.stepper.chunks,
            rank.pipeline.forwards(1),
            prompt,
            training.sample_tokens,
            training.sequence_length,
            rank.groups,
            rank.device,
            seed=training.seed,
            stop=tokenizer.end,
        )
    if reporter is not None:
        reporter.sample(step, training.sample_prompt, tokenizer.decode(continuation))


def _save(rank: Rank, step: int, reporter: Reporter | None, *, owes_evaluation: bool = False) -> None:
    facts: dict[str, Any] = {"step": step, "consumed_samples": step * rank.config.training.global_batch}
    facts["owes_evaluation"] = owes_evaluation
    if reporter is not None:
        facts |= {"config": asdict(rank.config), "data": rank.data_digest, "ledger": reporter.totals()}
    with _timing(reporter, "checkpoint_save"):
        path = rank.store.save(step, _state(rank), facts, rank.groups.world)
    if reporter is not None:
        reporter.checkpoint(step, path)


def _load(rank: Rank, step: int) -> dict[str, Any]:
    """Fill the rank's state from a checkpoint; return the checkpoint's facts."""
    facts = rank.store.facts(step)
    refuse_if_any(incompatibilities(facts, rank.config, rank.data_digest))
    state = _state(rank)
    rank.store.load(step, state, rank.groups.world)
    for moments in rank.stepper.optimizer.state.values():
        moments["step"].fill_(step)
    torch.set_rng_state(state[f"rng/rank_{rank.groups.rank:05d}"])
    return facts


def _state(rank: Rank) -> dict[str, torch.Tensor]:
    rng = {f"rng/rank_{rank.groups.rank:05d}": torch.get_rng_state()}
    return named_state(rank.model, rank.stepper.optimizer, rng)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _timing(reporter: Reporter | None, bucket: str) -> AbstractContextManager[None]:
    return nullcontext() if reporter is None else reporter.timing(bucket)
