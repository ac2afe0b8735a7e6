"""Simulated with unit times, every schedule has the bubble that its formula gives."""

import random
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from shoestring.parallelism.pipeline.check import verify_program
from shoestring.parallelism.pipeline.communication import P2POp, derive_p2p_batches
from shoestring.parallelism.pipeline.placement import Direction
from shoestring.parallelism.pipeline.program import Instruction, InvalidProgramError, Op, PipelineProgram
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_forward_program, build_program
from shoestring.parallelism.pipeline.simulate import InstructionDuration, OpDurations, simulate_program

Formula = Callable[[int, OpDurations], float]


def one_f_one_b(ranks: int, times: OpDurations) -> float:
    return (ranks - 1) * (times.forward + times.backward_duration)


def zb_h1(ranks: int, times: OpDurations) -> float:
    return (ranks - 1) * (times.forward + times.backward_duration - 2 * times.weight_gradient)


def dualpipe(ranks: int, times: OpDurations) -> float:
    return (ranks / 2 - 1) * (times.forward_backward_duration + times.backward_duration - 3 * times.weight_gradient)


def dualpipev(ranks: int, times: OpDurations) -> float:
    return (ranks - 1) * (times.forward_backward_duration + times.backward_duration - 3 * times.weight_gradient)


# A formula, the program's size for each number of ranks, and its peak of chunks in flight.
FORMULAS: dict[str, tuple[Formula, Callable[[int], tuple[int, ...]], Callable[[int, int], int]]] = {
    "gpipe": (one_f_one_b, lambda ranks: (ranks, 2 * ranks + 1), lambda ranks, n: n),
    "1f1b": (one_f_one_b, lambda ranks: (ranks, 2 * ranks, 2 * ranks + 3), lambda ranks, n: ranks),
    "interleaved": (one_f_one_b, lambda ranks: (ranks, 3 * ranks), lambda ranks, n: min(3 * ranks - 1, 2 * n)),
    "zb_h1": (zb_h1, lambda ranks: (ranks, 2 * ranks, 2 * ranks + 3), lambda ranks, n: ranks),
    "dualpipe": (dualpipe, lambda ranks: (2 * ranks, 2 * ranks + 2, 3 * ranks), lambda ranks, n: ranks + 1),
    "dualpipev": (dualpipev, lambda ranks: (2 * ranks, 2 * ranks + 3), lambda ranks, n: 2 * ranks + 1),
}
EQUAL_PEAKS = ("gpipe", "zb_h1", "dualpipe", "dualpipev")


def programs(schedule: str, ranks: range) -> Iterator[PipelineProgram]:
    for count in ranks:
        if schedule != "dualpipe" or count % 2 == 0:
            for micro_batches in FORMULAS[schedule][1](count):
                yield build_program(schedule, count, micro_batches)


@pytest.mark.parametrize("schedule", FORMULAS)
def test_bubble_and_peak_are_exact_on_every_rank_with_equal_times(schedule: str) -> None:
    formula, _, peak = FORMULAS[schedule]
    times = OpDurations()
    for program in programs(schedule, range(1, 17)):
        expected = formula(program.ranks, times)
        assert simulate_program(program, times).bubble_time_per_rank == pytest.approx(
            [expected] * program.ranks, abs=1e-9
        )
        peaks = verify_program(program)
        assert max(peaks) == peak(program.ranks, program.num_micro_batches)
        if schedule in EQUAL_PEAKS:
            assert set(peaks) == {max(peaks)}


@pytest.mark.parametrize("pair", [2.2, 2.6, 2.9])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_with_overlap_the_formula_is_the_largest_bubble(schedule: str, pair: float) -> None:
    times = OpDurations(forward_backward=pair)
    for program in programs(schedule, range(1, 13)):
        expected = FORMULAS[schedule][0](program.ranks, times)
        assert max(simulate_program(program, times).bubble_time_per_rank) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("times", [OpDurations(2, 3, 1), OpDurations(1, 1.6, 0.8), OpDurations(2, 1, 1)], ids=str)
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_one_way_formulas_hold_with_any_times_that_fit(schedule: str, times: OpDurations) -> None:
    for program in programs(schedule, range(1, 13)):
        expected = FORMULAS[schedule][0](program.ranks, times)
        assert simulate_program(program, times).bubble_time_per_rank == pytest.approx(
            [expected] * program.ranks, abs=1e-9
        )


@pytest.mark.parametrize(
    "times", [OpDurations(1, 1.6, 0.8, forward_backward=2.6), OpDurations(1, 2, 1), OpDurations(2, 3, 1)], ids=str
)
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_with_weight_gradients_shorter_than_the_rest_the_formula_is_a_bound(schedule: str, times: OpDurations) -> None:
    for program in programs(schedule, range(2, 13)):
        largest = max(simulate_program(program, times).bubble_time_per_rank)
        bound = FORMULAS[schedule][0](program.ranks, times)
        assert 0.7 * bound <= largest <= bound + 1e-9


def test_dualpipe_of_deepseek_v3_with_unequal_times() -> None:
    # The figures of an independent simulation of the published program.
    bubbles = simulate_program(
        build_program("dualpipe", 16, 120), OpDurations(1, 1.6, 0.8, forward_backward=2.6)
    ).bubble_time_per_rank
    assert bubbles[:8] == pytest.approx([12.4, 13.2, 14.0, 14.8, 15.6, 16.4, 17.2, 17.2])
    assert bubbles[8:] == pytest.approx(bubbles[:8][::-1])


@pytest.mark.parametrize("schedule", FORMULAS)
def test_rendezvous_costs_no_time(schedule: str) -> None:
    """Sends that wait for their receives delay nothing: it takes as long as with unlimited buffers."""
    for times in (OpDurations(), OpDurations(1, 1.6, 0.8, forward_backward=2.6), OpDurations(2, 1, 1)):
        for program in programs(schedule, range(2, 9, 2)):
            assert simulate_program(program, times).makespan == makespan_with_unlimited_buffers(program, times)


def makespan_with_unlimited_buffers(program: PipelineProgram, times: OpDurations) -> float:
    commits = derive_p2p_batches(program)
    made: dict[P2POp, float] = {}
    ends: list[list[float]] = [[] for _ in program.instructions]
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(program.instructions):
            while (index := len(ends[rank])) < len(row) and all(
                op in made for op in commits[rank][index].required_receives
            ):
                start = max(
                    [*ends[rank][-1:], *(made[op] for op in commits[rank][index].required_receives)], default=0.0
                )
                ends[rank].append(start + times(rank, row[index]))
                made.update(dict.fromkeys(commits[rank][index + 1].sends, ends[rank][-1]))
                moved = True
    return max(rank[-1] for rank in ends)


def rendezvous_ends(
    program: PipelineProgram, duration: InstructionDuration, transfer: float
) -> tuple[tuple[float, ...], ...]:
    """Ends of all instructions, from the definition in `derive_p2p_batches`: each time asks for those before it."""
    rows = derive_p2p_batches(program)
    queues: dict[tuple[int, Direction], list[tuple[int, tuple[P2POp, ...]]]] = {}
    ends_of: dict[P2POp, list[tuple[int, Direction, int]]] = {}
    for rank, row in enumerate(rows):
        for direction in Direction:
            queue = queues[rank, direction] = []
            for index, batch in enumerate(row):
                messages = tuple(op for op in (*batch.sends, *batch.receives) if op.direction is direction)
                for op in messages:
                    ends_of.setdefault(op, []).append((rank, direction, len(queue)))
                if messages:
                    queue.append((index, messages))

    @cache
    def opens(rank: int, direction: Direction, number: int) -> float:
        index = queues[rank, direction][number][0]
        earlier = completes(rank, direction, number - 1) if number else 0.0
        return max(earlier, end(rank, index - 1) if index else 0.0)

    @cache
    def completes(rank: int, direction: Direction, number: int) -> float:
        return max(opens(*there) for op in queues[rank, direction][number][1] for there in ends_of[op]) + transfer

    @cache
    def end(rank: int, index: int) -> float:
        needs = rows[rank][index].required_receives
        arrivals = [completes(*there) for op in needs for there in ends_of[op] if there[0] == rank]
        start = max([end(rank, index - 1) if index else 0.0, *arrivals])
        return start + duration(rank, program.instructions[rank][index])

    return tuple(tuple(end(rank, index) for index in range(len(row))) for rank, row in enumerate(program.instructions))


@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
@pytest.mark.parametrize("schedule", [schedule.name for schedule in SCHEDULES])
def test_times_are_those_of_the_definition_to_the_last_bit(schedule: str, ranks: int) -> None:
    if schedule == "dualpipe" and ranks % 2:
        pytest.skip("mirrored ranks are even")
    program = build_program(schedule, ranks, 3 * ranks if schedule != "dualpipe" else 2 * ranks + 2)
    dice = random.Random(ranks)
    durations = {
        (rank, entry): dice.uniform(0.5, 3.0) for rank, row in enumerate(program.instructions) for entry in row
    }
    for transfer in (0.0, 0.25):
        times = simulate_program(program, lambda *key: durations[key], transfer)
        assert times.end_times == rendezvous_ends(program, lambda *key: durations[key], transfer)


def test_times_of_forwards_alone_are_those_of_the_definition() -> None:
    program = build_forward_program(build_program("interleaved", 3, 6).placement, 6)
    times = simulate_program(program, lambda rank, _: 1.0 + rank, 0.5)
    assert times.end_times == rendezvous_ends(program, lambda rank, _: 1.0 + rank, 0.5)


def test_times_by_hand() -> None:
    result = simulate_program(build_program("1f1b", 2, 2), OpDurations(1, 1, 1))
    assert result.start_times == ((0.0, 1.0, 4.0, 7.0), (1.0, 2.0, 4.0, 5.0))  # F0 F1 B0 B1 and F0 B0 F1 B1
    assert result.end_times == ((1.0, 2.0, 6.0, 9.0), (2.0, 4.0, 5.0, 7.0))
    assert result.makespan == 9
    assert result.busy_time_per_rank == (6.0, 6.0)
    assert result.bubble_time_per_rank == (3.0, 3.0)
    assert result.bubble_fraction == pytest.approx(1 / 3)


def test_durations_may_depend_on_the_rank() -> None:
    def slow_last(rank: int, instruction: Instruction) -> float:
        return 2.0 if rank == 1 and instruction.op is Op.F else 1.0

    assert simulate_program(build_program("gpipe", 2, 2), slow_last).makespan == 1 + 2 * 2 + 2 * 1 + 1


def test_a_transfer_takes_its_time() -> None:
    program = build_program("1f1b", 2, 1)
    assert simulate_program(program, OpDurations()).makespan == 6
    assert simulate_program(program, OpDurations(), transfer_time=0.25).makespan == 6.5


def test_a_deadlock_ends_the_simulation() -> None:
    program = build_program("1f1b", 2, 3)
    f0, b0, f1, b1, f2, b2 = program.instructions[1]
    broken = PipelineProgram(
        program.schedule, program.placement, 3, (program.instructions[0], (f0, f1, f2, b0, b1, b2))
    )
    with pytest.raises(InvalidProgramError, match="deadlock"):
        simulate_program(broken, OpDurations())


def test_unit_times_add_up() -> None:
    times = OpDurations(1, 2, 3)
    assert [times.duration_of_op(op) for op in Op] == [1, 5, 2, 3, 6]
    assert OpDurations(1, 2, 3, backward=4).forward_backward_duration == 5
    assert OpDurations(1, 2, 3, forward_backward=5.5).duration_of_op(Op.FB) == 5.5
