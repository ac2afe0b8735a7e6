"""P2P messages: each once at both ends, in one order, never later than needed."""

from collections import defaultdict

import pytest

from shoestring.parallelism.pipeline.communication import P2POp, P2PTensorKind, derive_p2p_batches
from shoestring.parallelism.pipeline.placement import Direction
from shoestring.parallelism.pipeline.program import ChunkMicroBatch, Op, PipelineProgram
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_program

PROGRAMS = [
    build_program(each.name, ranks, 24)
    for each in SCHEDULES
    for ranks in (2, 3, 6)
    if not (each.name == "dualpipe" and ranks % 2)
]


def named(program: PipelineProgram) -> str:
    return f"{program.schedule}-{program.ranks}"


def short(op: P2POp) -> str:
    return f"{op.tensor_kind.value[0]}{op.micro_batch} {op.source.rank}>{op.target.rank} {op.direction}"


def test_one_f_one_b_in_full() -> None:
    program = build_program("1f1b", 2, 2)
    posted = [
        [([short(op) for op in commit.sends], [short(op) for op in commit.receives]) for commit in rank]
        for rank in derive_p2p_batches(program)
    ]
    gradients = ["g0 1>0 prev", "g1 1>0 prev"]
    activations = ["a0 0>1 next", "a1 0>1 next"]
    assert posted[0] == [  # F0 F1 B0 B1: the receive of the first gradient is posted first
        ([], [gradients[0]]),
        ([activations[0]], []),
        ([activations[1]], []),
        ([], [gradients[1]]),
        ([], []),
    ]
    assert posted[1] == [  # F0 B0 F1 B1
        ([], [activations[0]]),
        ([], [activations[1]]),
        ([gradients[0]], []),
        ([], []),
        ([gradients[1]], []),
    ]


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_every_message_is_posted_once_at_both_ends_in_one_order(program: PipelineProgram) -> None:
    sent, received = defaultdict(list), defaultdict(list)
    for rank, commits in enumerate(derive_p2p_batches(program)):
        for commit in commits:
            for op in commit.sends:
                assert op.source.rank == rank
                sent[op.source.rank, op.target.rank, op.direction].append(op)
            for op in commit.receives:
                assert op.target.rank == rank
                received[op.source.rank, op.target.rank, op.direction].append(op)
    assert sent == received
    messages = [op for channel in sent.values() for op in channel]
    assert len(messages) == len(set(messages))
    hops = sum(
        following is not None and following.rank != place.rank
        for place in program.placement.all_locations()
        for following in [program.placement.next_location(place)]
    )
    each = program.micro_batches_in_chunk(0)
    assert len(messages) == 2 * hops * each  # an activation and a gradient


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_what_is_needed_has_been_received_and_what_is_sent_has_been_made(program: PipelineProgram) -> None:
    for rank, commits in enumerate(derive_p2p_batches(program)):
        row = program.instructions[rank]
        here: set[P2POp] = set()
        assert len(commits) == len(row) + 1
        for index, commit in enumerate(commits):
            here.update(commit.receives)
            assert here.issuperset(commit.required_receives)
            here.difference_update(commit.required_receives)
            if index < len(row):
                for op in commit.required_receives:
                    needing = row[index].forward if op.tensor_kind is P2PTensorKind.ACTIVATION else row[index].backward
                    assert op.consumer == needing
                    assert row[index].op is not Op.W
            for op in commit.sends:
                made = row[index - 1].forward if op.tensor_kind is P2PTensorKind.ACTIVATION else row[index - 1].backward
                assert op.producer == made
        assert not here


@pytest.mark.parametrize("program", PROGRAMS, ids=named)
def test_a_direction_has_one_neighbor_to_send_to_and_one_to_receive_from(program: PipelineProgram) -> None:
    for rank, commits in enumerate(derive_p2p_batches(program)):
        for direction, step in ((Direction.NEXT, 1), (Direction.PREV, -1)):
            mine = [op for commit in commits for op in (*commit.sends, *commit.receives)]
            for op in (op for op in mine if op.direction is direction):
                other = op.target.rank if op.source.rank == rank else op.source.rank
                way = step if op.source.rank == rank else -step
                assert other == (rank + way) % program.ranks


def test_a_message_made_early_is_received_in_its_turn() -> None:
    # Rank 0 makes activation 4 two instructions before gradient 0; rank 1 needs the gradient first.
    commits = derive_p2p_batches(build_program("dualpipe", 6, 12))[1]
    at = {short(op): index for index, commit in enumerate(commits) for op in commit.receives}
    needed = {short(op): index for index, commit in enumerate(commits) for op in commit.required_receives}
    assert needed["a4 0>1 next"] > needed["g0 0>1 next"]
    assert at["a4 0>1 next"] <= at["g0 0>1 next"] <= needed["g0 0>1 next"]


def test_what_stays_on_a_rank_is_no_p2p_op() -> None:
    for name in ("gpipe", "interleaved", "dualpipev"):
        assert not any(commit.sends or commit.receives for commit in derive_p2p_batches(build_program(name, 1, 4))[0])
    turn = [op for commit in derive_p2p_batches(build_program("dualpipev", 2, 4))[1] for op in commit.sends]
    assert {(op.producer.chunk, op.tensor_kind) for op in turn} == {
        (1, P2PTensorKind.ACTIVATION),
        (0, P2PTensorKind.GRADIENT),
    }


def test_chunks_are_numbered_by_the_rank_at_each_end() -> None:
    posted = derive_p2p_batches(build_program("interleaved", 2, 2))[1]
    wrapped = [op for commit in posted for op in commit.sends if op.source.chunk < op.target.chunk]
    assert [(op.producer, op.consumer) for op in wrapped] == [
        (ChunkMicroBatch(0, 0), ChunkMicroBatch(1, 0)),
        (ChunkMicroBatch(0, 1), ChunkMicroBatch(1, 1)),
    ]
    assert str(wrapped[0]) == "activation of micro-batch 0 from rank 1 chunk 0 to rank 0 chunk 1"
