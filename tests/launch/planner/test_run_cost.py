"""A whole run: the batch ramp, illegal layouts, failures."""

import math
from dataclasses import replace

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.planner.run_cost import (
    CONTEXT_EXTENSION_PHASES,
    FailureModel,
    batch_size_problem,
    pretraining_gpu_hours,
    run_phase_costs,
    sensitivity_analysis,
)
from shoestring.launch.verbs.simulate import simulate
from shoestring.trainer.config import RunConfig

from .v3 import simulated


def test_the_ramp_costs_more_a_token_than_the_full_batch() -> None:
    simulation = simulated()
    phases = {phase.name: phase for phase in simulation.phase_costs}
    tokens = simulation.config.training.rampup_tokens
    full = simulation.forecast.gpu_hours(tokens)
    assert 1.02 * full < phases["batch ramp"].gpu_hours < 1.3 * full
    assert phases["context extension"].evidence == "published"
    assert phases["context extension"].gpu_hours == 119_000


def test_without_a_ramp_there_is_no_such_phase() -> None:
    config = _with_ramp(rampup_tokens=0)
    phases = run_phase_costs(config, simulated().forecaster, simulated().forecast)
    assert [phase.name for phase in phases] == ["pre-training", "context extension", "post-training"]


def test_a_run_that_is_not_deepseeks_has_none_of_its_later_phases() -> None:
    simulation = simulate(["experiment=deepseek_v3_h800", "training.tokens=1_000_000_000_000"], None, {})
    assert [phase.name for phase in simulation.phase_costs] == ["batch ramp", "pre-training"]
    assert pretraining_gpu_hours(simulation.phase_costs) == sum(phase.gpu_hours for phase in simulation.phase_costs)


def test_a_size_that_the_grid_cannot_run_is_refused_and_not_extrapolated() -> None:
    config = _with_ramp(rampup_start_batch_size=3072, rampup_batch_size_increment=256)
    words = "3,072 sequences = 24 micro-batches of 128, illegal .* nearest legal 4,096 sequences"
    with pytest.raises(ConfigError, match=words):
        run_phase_costs(config, simulated().forecaster, simulated().forecast)


def _with_ramp(**ramp: int) -> RunConfig:
    config = simulated().config
    return replace(config, training=replace(config.training, **ramp))  # type: ignore[arg-type]


def test_few_sms_are_a_question_and_both_ends_of_its_answer() -> None:
    simulation = simulated()
    asked = sensitivity_analysis(
        simulation.forecaster, simulation.layout, simulation.forecast.recipe, simulation.global_batch
    )
    fast, slow = (seconds for change, seconds in asked.items() if "SMs reserved" in change)
    assert fast < simulation.forecast.step_seconds < slow


def test_long_phases_are_explained_with_the_nearest_legal_batch() -> None:
    notes = [batch_size_problem(simulated().layout, sequences) for _, sequences in CONTEXT_EXTENSION_PHASES]
    assert notes[0] == (
        "1,920 sequences = 15 micro-batches of 128, illegal for dualpipe on 16 ranks; "
        "nearest legal 4,096 sequences (32 micro-batches)"
    )
    assert notes[1] is not None
    assert "480 sequences = 3.75 micro-batches of 128, not a whole number" in notes[1]
    (shown,) = (phase.note for phase in simulated().phase_costs if phase.name == "context extension")
    assert shown.startswith(f"32 K: {notes[0]}; 128 K: {notes[1]}; ")


def test_the_best_interval_loses_least() -> None:
    failures, gpus = FailureModel(), 2048

    def lost(interval: float) -> float:
        mean = failures.mean_seconds_between_failures(gpus)
        return failures.checkpoint_seconds / interval + interval / (2 * mean) + failures.restart_seconds / mean

    best = failures.best_checkpoint_interval(gpus)
    assert lost(best) < min(lost(best * 0.8), lost(best * 1.25))
    assert failures.effective_training_share(gpus) == pytest.approx(1 - lost(best))
    assert failures.mean_seconds_between_failures(2 * gpus) == failures.mean_seconds_between_failures(gpus) / 2
    assert math.isclose(failures.mean_seconds_between_failures(16_384) * 419, 54 * 86_400)
