"""The memory of whole runs: the predicted bytes are the allocated ones."""

import pytest

from shoestring.tests.trainer.memory.measured_runs import ONE_RANK, run
from shoestring.trainer.memory.forecast import PREDICTION_MARGIN

QUICK = (
    "topology.ep=2",
    "topology.pp=2 schedule=zb_h1 recompute=deepseek_v3",
    "topology.pp=2 topology.ep=2 schedule=dualpipev model.num_hidden_layers=4",
    "precision=fp8 recompute=deepseek_v3 model.num_hidden_layers=2 model.num_nextn_predict_layers=0"
    " schedule.micro_batch_size=4",
)
SLOW = (
    "",
    "schedule.micro_batch_size=4 recompute=everything",
    "topology.edp=2 precision=bf16 optimizer.ema_decay=0.9",
    "topology.ep=4 exchange=two_hop topology.gpus_per_node=2",
    "topology.pp=2 schedule.micro_batch_size=2",
    "topology.pp=2 schedule=gpipe precision=bf16 recompute=deepseek_v3",
    "topology.pp=2 topology.ep=2 schedule=dualpipe recompute=deepseek_v3 training.global_batch_size=16",
    "topology.pp=2 topology.edp=2 schedule=interleaved model.num_hidden_layers=4 training.global_batch_size=16",
    "topology.ep=2 exchange=two_hop_fp8 precision=fp8 optimizer.moments=float32",
    "topology.pp=2 schedule=zb_h1 precision=fp8 recompute=deepseek_v3",
)


@pytest.mark.parametrize(
    "overrides", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=lambda o: o or "single"
)
def test_predicted_is_what_is_allocated(overrides: str) -> None:
    memory, ranks = run(overrides)
    topology = memory.config.topology
    for rank, found in enumerate(ranks):
        predicted = memory.predict_rank(topology.pp_rank(rank))
        errors = predicted.between_instructions / found.between_instructions - 1, predicted.total / found.total - 1
        print(f"rank {rank}: between instructions {errors[0]:+.1%}, at the worst moment {errors[1]:+.1%}")
        assert predicted.state == found.state  # to the byte
        assert abs(errors[0]) <= PREDICTION_MARGIN
        assert abs(errors[1]) <= PREDICTION_MARGIN
        assert found.between_instructions > 0.1 * found.total  # otherwise the last line would say little of activations


def test_all_tokens_on_one_rank_stay_within_the_bound() -> None:
    memory, ranks = run(ONE_RANK, skewed=True)
    for rank, found in enumerate(ranks):
        predicted = memory.predict_rank(0, memory.skewed_expert_rows(rank))
        print(
            f"rank {rank}: {found.total:,} bytes, predicted {predicted.total:,.0f}, "
            f"bound {memory.upper_bound_bytes(0):,.0f}"
        )
        assert found.total == pytest.approx(predicted.total, rel=PREDICTION_MARGIN)
        assert found.between_instructions == pytest.approx(predicted.between_instructions, rel=PREDICTION_MARGIN)
        assert found.total <= memory.upper_bound_bytes(0)
    overloaded, *idle = ranks
    assert all(overloaded.total > found.total for found in idle)
