"""What is recorded of a rehearsed rank: its memory, its waits, its launches."""

from __future__ import annotations

from collections import Counter

import torch

from shoestring.launch.rehearsal.log import Collective, HostWait, RankLog
from shoestring.tests.launch.rehearsal.rehearsed_rank import (
    BF16_RANK,
    config_of,
)
from shoestring.trainer.build import stages_of
from shoestring.trainer.memory.forecast import MARGIN, RunMemory
from shoestring.trainer.run.step import HOST_READS_A_STEP


def test_memory_is_what_is_predicted(log: RankLog) -> None:
    config, live = config_of(log), log.memory
    memory = RunMemory(config, torch.device("cuda"))
    predicted = memory.of(log.pp_rank)
    chunks = stages_of(config).chunks(log.pp_rank)
    layers = [layer for chunk in chunks for layer in chunk.layers]
    routers = sum(layer >= config.model.first_k_dense_replace for layer in layers) + any(c.is_last for c in chunks)
    biases = 4 * config.model.n_routed_experts * routers  # of routers, which the prediction leaves out
    # Angles of positions, which a chunk keeps from its first forward on: complex64.
    angles = 8 * len(chunks) * config.training.sequence_length * config.model.qk_rope_head_dim // 2
    beyond = live.state - (predicted.state.total - predicted.state.fp8_weights) - biases - angles
    assert 0 <= beyond <= 16  # what the lanes connected with: messages of one element
    assert live.predicted == predicted.allocated
    assert abs(live.peak / live.predicted - 1) < MARGIN
    assert live.building >= live.state
    assert live.by_phase[live.peak_phase] == live.peak == max(live.by_phase.values())


def test_the_host_waits_for_sizes_and_for_the_sums_of_the_step(log: RankLog) -> None:
    waits = [event for event in log.events if isinstance(event, HostWait) and not event.is_warm_up]
    collectives = [event for event in log.events if isinstance(event, Collective) and not event.is_warm_up]
    sizes = [event for event in collectives if event.what.startswith("sizes of")]
    assert sizes
    assert Counter(wait.reason for wait in waits) == {"read": HOST_READS_A_STEP, "event": len(sizes)}
    assert {wait.reason for wait in waits if wait.is_inside_pair} <= {"event"}
    assert any(wait.is_inside_pair for wait in waits) == (log.rank == BF16_RANK)  # DualPipe alone has FBs
    assert all("comm/" in wait.place and "micro-batch" in wait.place for wait in waits if wait.reason == "event")


def test_kernels_of_triton_are_counted_by_their_tensors(in_fp8: RankLog) -> None:
    config = config_of(in_fp8)
    rows = [row for row in in_fp8.launches if row.operation == "triton.multiply" and row.phase == "mlp(F)"]
    assert {row.layer for row in rows} == {"layer_01", "layer_02"}
    assert {row.place for row in rows} == {"trainer/precision/triton_backend.py:TritonBackend.multiply_grouped"}
    micro_batches = 2 * in_fp8.micro_batches  # of two layers
    assert sum(row.launches for row in rows) == 4 * micro_batches  # shared and routed experts, two products each
    read = (
        config.model.hidden_size * config.training.sequence_length * config.model.num_experts_per_tok
    )  # FP8 rows for the experts
    assert sum(row.bytes for row in rows) > 2 * micro_batches * read
