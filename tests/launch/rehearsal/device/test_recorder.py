"""The log of a rehearsed rank: memory, waits and launches."""

from collections import Counter

import pytest
import torch

from shoestring.comm.trace import TimelineTrack
from shoestring.launch.rehearsal.device.recorder import RankRecorder
from shoestring.launch.rehearsal.device.spans import RehearsalSpanRecorder
from shoestring.launch.rehearsal.log import CollectiveRecord, HostWait, RankLog
from shoestring.parallelism.pipeline.program import Op
from shoestring.tests.launch.rehearsal.rehearsed_rank import (
    BF16_RANK,
    config_of,
)
from shoestring.trainer.build import build_stage_layout
from shoestring.trainer.memory.forecast import PREDICTION_MARGIN, MemoryPredictor
from shoestring.trainer.run.step import HOST_READS_PER_STEP


def test_memory_is_what_is_predicted(log: RankLog) -> None:
    config, live = config_of(log), log.memory
    memory = MemoryPredictor(config, torch.device("cuda"))
    predicted = memory.predict_rank(log.pp_rank)
    chunks = build_stage_layout(config).stages_of_rank(log.pp_rank)
    layers = [layer for chunk in chunks for layer in chunk.layers]
    routers = sum(layer >= config.model.first_k_dense_replace for layer in layers) + any(c.is_last for c in chunks)
    biases = 4 * config.model.n_routed_experts * routers  # of routers; the prediction leaves them out
    # Rotary angles, complex64: a chunk keeps them from its first forward on.
    angles = 8 * len(chunks) * config.training.sequence_length * config.model.qk_rope_head_dim // 2
    beyond = live.state_bytes - (predicted.state.total - predicted.state.fp8_weights) - biases - angles
    assert 0 <= beyond <= 16  # the P2P channels connect with messages of one element
    assert live.predicted_peak_bytes == predicted.allocator_bytes
    assert abs(live.peak_bytes / live.predicted_peak_bytes - 1) < PREDICTION_MARGIN
    assert live.peak_while_building_bytes >= live.state_bytes
    assert live.peak_bytes_by_phase[live.peak_phase] == live.peak_bytes == max(live.peak_bytes_by_phase.values())


def test_the_host_waits_for_sizes_and_for_the_sums_of_the_step(log: RankLog) -> None:
    waits = [event for event in log.events if isinstance(event, HostWait) and not event.is_warm_up]
    collectives = [event for event in log.events if isinstance(event, CollectiveRecord) and not event.is_warm_up]
    sizes = [event for event in collectives if event.purpose.startswith("sizes of")]
    assert sizes
    assert Counter(wait.reason for wait in waits) == {"read": HOST_READS_PER_STEP, "event": len(sizes)}
    assert {wait.reason for wait in waits if wait.is_inside_fb} <= {"event"}
    assert any(wait.is_inside_fb for wait in waits) == (log.rank == BF16_RANK)  # only DualPipe has FBs
    assert all(
        "comm/" in wait.code_location and "micro-batch" in wait.code_location
        for wait in waits
        if wait.reason == "event"
    )


def test_kernels_of_triton_are_counted_by_their_tensors(in_fp8: RankLog) -> None:
    config = config_of(in_fp8)
    rows = [row for row in in_fp8.launches if row.operation == "triton.grouped_gemm" and row.phase == "mlp(F)"]
    assert {row.layer for row in rows} == {"layer_01", "layer_02"}
    assert {row.code_location for row in rows} == {"trainer/precision/triton_backend.py:TritonBackend.grouped_gemm"}
    micro_batches = 2 * in_fp8.micro_batches  # of two layers
    assert sum(row.launches for row in rows) == 4 * micro_batches  # shared and routed experts, two products each
    read = (
        config.model.hidden_size * config.training.sequence_length * config.model.num_experts_per_tok
    )  # FP8 rows for the experts
    assert sum(row.bytes for row in rows) > 2 * micro_batches * read


@pytest.mark.parametrize(
    ("instruction", "phase", "reason", "is_found"),
    [
        (Op.FB, "attn(F) of layer_01, micro-batch 2", "read", True),
        (Op.FB, "attn(F) of layer_01, micro-batch 2", "event", True),
        (Op.FB, "dispatch of layer_01, micro-batch 2", "read", True),
        (Op.FB, "dispatch of layer_01, micro-batch 2", "event", False),
        (Op.F, "attn(F) of layer_01, micro-batch 2", "read", False),
    ],
)
def test_inside_a_pair_the_host_waits_for_events_of_sizes_alone(
    instruction: Op, phase: str, reason: str, is_found: bool
) -> None:
    recorder = RankRecorder(RehearsalSpanRecorder("step"))
    span = recorder.spans.span
    with span(TimelineTrack.INSTRUCTION, instruction, "instruction 3"), span(TimelineTrack.COMPUTE, phase):
        recorder.record_host_wait(None, "compute", reason)
        recorder.record_host_wait(None, "compute", reason)
    texts = [(found.kind, found.text) for found in recorder.findings]
    assert texts == [("host read", f"the host waits for stream compute ({reason}) inside an FB")] * is_found
    assert {wait.is_inside_fb for wait in recorder.events if isinstance(wait, HostWait)} == {instruction == Op.FB}
