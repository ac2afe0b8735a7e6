"""Whatever happens to a run, in any order: the parts add up, each is what happened, and no token counts twice.

Random sequences of events drive the ledger and a plain model, which knows nothing of journals and gives the expected
totals. Durations are whole milliseconds, so that both must agree exactly.
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.clock import Instant
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.summary import LedgerReader, LedgerSummary, summarize_ledger
from shoestring.trainer.ledger.terms import CHARGED_BUCKETS, STEP_TIME_TERMS
from shoestring.trainer.ledger.work_journal import WorkJournal

BUDGET = BudgetConfig(gpu_hours=1)
NEVER = 1e6
MS = 1_000_000


class Clock:
    """Both clocks of a machine that reboots and whose wall clock is set."""

    def __init__(self) -> None:
        self.wall, self.monotonic, self.boot = 10**18, 10**12, 0

    def now(self) -> Instant:
        return Instant(self.wall, self.monotonic, f"boot {self.boot}")

    def pass_ns(self, ns: int) -> None:
        self.wall += ns
        self.monotonic += ns

    def reboot(self) -> None:
        self.boot += 1
        self.monotonic = 0


class Model:
    """The expected totals, computed by addition alone."""

    def __init__(self) -> None:
        self.allocated = 0
        self.spent: Counter[str] = Counter()
        self.weights: dict[int, tuple[int, int]] = {}
        """GPU-ms and tokens of each retained step."""
        self.rolled_back = 0
        self.consumed = 0

    def spend(self, bucket: str, gpu_ms: int) -> None:
        self.allocated += gpu_ms
        self.spent[bucket] += gpu_ms

    def step(self, step: int, gpu_ms: int, tokens: int) -> None:
        self.allocated += gpu_ms
        self.weights[step] = gpu_ms, tokens
        self.consumed += tokens

    def resume(self, step: int) -> None:
        for undone in [number for number in self.weights if number > step]:
            self.rolled_back += self.weights.pop(undone)[0]

    def check(self, summary: LedgerSummary) -> None:
        productive = sum(gpu_ms for gpu_ms, _ in self.weights.values())
        found = {bucket: gpu_ms for bucket, gpu_ms in summary.gpu_ms_by_bucket.items() if gpu_ms}
        found |= {"unattributed": summary.unattributed_ms} if summary.unattributed_ms else {}
        assert found == {bucket: gpu_ms for bucket, gpu_ms in self.spent.items() if gpu_ms}
        assert (summary.allocated_ms, summary.productive_ms) == (self.allocated, productive)
        assert summary.rolled_back_ms == self.rolled_back
        assert summary.tokens_retained == sum(tokens for _, tokens in self.weights.values())
        assert (summary.tokens_consumed, summary.steps_retained) == (self.consumed, len(self.weights))


class Story:
    """A run whose events go to the ledger and to the model."""

    def __init__(self, run_dir: Path, clock: Clock, dice: random.Random) -> None:
        self.run_dir, self.clock, self.dice = run_dir, clock, dice
        self.model = Model()
        self.reader = LedgerReader(run_dir)
        self.launches = 0
        self.saved = self.step = 0
        self.has_died = False
        self.allocation: AllocationJournal | None = None
        self.work: WorkJournal | None = None
        self.ranks = 0

    def ms(self) -> int:
        return self.dice.choice((0, 1, 7, 40, 900, 20_000))

    def let(self, milliseconds: int) -> int:
        """Let time pass; return GPU-milliseconds."""
        self.clock.pass_ns(milliseconds * MS)
        return milliseconds * self.ranks

    def launch(self) -> None:
        self.clock.pass_ns(self.ms() * MS)  # no GPU is allocated
        self.launches += 1
        self.ranks = self.dice.choice((1, 2, 4, 8))
        self.allocation = AllocationJournal(
            self.run_dir, ranks=self.ranks, attempt=f"launch {self.launches}", budget=BUDGET, heartbeat_seconds=NEVER
        )
        self.attempts = 0
        self.begin()

    def begin(self) -> None:
        """Begin an attempt: it loads the checkpoint, or starts from nothing."""
        start = "restart" if self.has_died else "initialization"
        if not self.attempts:
            self.model.spend(start, self.let(self.ms()))
        else:  # torchrun may restart with fewer or more ranks
            self.ranks = self.dice.choice((self.ranks, 2, 4))
        self.work = WorkJournal(self.run_dir, ranks=self.ranks, attempt=f"launch {self.launches}", budget=BUDGET)
        self.attempts += 1
        self.has_died = True
        if self.dice.random() < 0.15:  # it dies during start-up and has written nothing since its beginning
            self.rank_dies()
            return
        self.model.spend(start, self.let(self.ms()))
        if self.saved:
            self.charge("checkpoint_load")
            self.work.record_resume(self.saved)
        self.model.resume(self.saved)
        self.step = self.saved
        self.model.spend(start, self.let(self.ms()))
        self.work.record_ready()

    def charge(self, bucket: str) -> None:
        assert self.work is not None
        milliseconds = self.ms()
        self.model.spend(bucket, self.let(milliseconds))
        self.work.record_interval(bucket, milliseconds)

    def train(self) -> None:
        assert self.work is not None
        self.charge("data_stall")
        self.step += 1
        milliseconds, tokens = self.ms(), self.dice.choice((256, 1024))
        self.model.step(self.step, self.let(milliseconds), tokens)
        self.work.record_step(self.step, milliseconds, tokens)

    def skip(self) -> None:
        assert self.work is not None
        milliseconds = self.ms()
        self.model.spend("skipped", self.let(milliseconds))
        self.model.consumed += 512
        self.work.record_skipped_step(self.step + 1, milliseconds, 512)

    def save(self) -> None:
        self.charge("checkpoint_save")
        self.saved = self.step

    def look(self) -> None:
        self.charge(self.dice.choice(sorted(CHARGED_BUCKETS)))

    def waste(self) -> None:
        """Let unattributed time pass until the next record."""
        assert self.work is not None
        self.model.spend("unattributed", self.let(self.ms()))
        self.work.record_interval("telemetry", 0)

    def set_the_clock(self) -> None:
        self.clock.wall += self.dice.choice((-1, 1)) * self.dice.randrange(10**18)

    def rank_dies(self) -> None:
        """Kill a rank; torchrun restarts it in the same launch."""
        assert self.work is not None
        self.work._journal.close()
        self.model.spend("hang", self.let(self.ms()))
        self.begin()

    def fault(self) -> None:
        """End rank 0 because another rank died."""
        assert self.work is not None
        self.model.spend("hang", self.let(self.ms()))
        self.work.close(clean=False)
        self.model.spend("restart", self.let(self.ms()))
        self.begin()

    def launcher_dies(self) -> None:
        """Kill the launcher. The last record is its heartbeat or rank 0's; what came later is unknown."""
        assert self.work is not None and self.allocation is not None  # noqa: PT018
        if self.dice.random() < 0.5:
            self.model.spend("hang", self.let(self.ms()))
            self.allocation.write_heartbeat()
        self.clock.pass_ns(self.ms() * MS)
        self.work._journal.close()
        self.allocation._closing.set()
        self.allocation._journal.close()
        if self.dice.random() < 0.3:
            self.clock.reboot()
        self.set_the_clock()
        self.launch()

    def stop(self) -> None:
        """Stop on purpose, and start again."""
        assert self.work is not None and self.allocation is not None  # noqa: PT018
        self.work.close()
        self.has_died = False
        self.model.spend("idle", self.let(self.ms()))
        self.allocation.close("done")
        self.launch()


@pytest.mark.parametrize("seed", range(25))
def test_any_sequence_of_events_keeps_the_identity_and_credits_no_token_twice(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, dice = Clock(), random.Random(seed)
    monkeypatch.setattr(Instant, "now", clock.now)
    story = Story(tmp_path, clock, dice)
    story.launch()
    events: list[Callable[[], None]] = [story.skip, story.save, story.look, story.waste, story.set_the_clock]
    events += [story.rank_dies, story.fault, story.launcher_dies, story.stop]
    weights = [2, 4, 4, 2, 2, 2, 1, 2, 1]
    for _ in range(60):
        dice.choices([story.train, *events], [20, *weights])[0]()
        summary = story.reader.summarize()
        story.model.check(summary)
    assert summarize_ledger(tmp_path) == summary  # read incrementally, or in one call
    assert story.launches > 1
    assert story.allocation is not None
    story.allocation._closing.set()


@pytest.mark.parametrize("seed", range(10))
def test_durations_of_any_length_add_up_as_well(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing becomes negative with fractions of milliseconds, and rounding costs under a millisecond per rank."""
    clock, dice = Clock(), random.Random(seed)
    monkeypatch.setattr(Instant, "now", clock.now)
    covered_ns = 0
    for _ in range(3):
        clock.pass_ns(dice.randrange(MS))
        work = WorkJournal(tmp_path, ranks=3, attempt="a", budget=BUDGET)
        ns = dice.randrange(3 * MS)
        clock.pass_ns(ns)
        work.record_interval("checkpoint_load", ns / 1e6)
        work.record_ready()
        for step in range(1, 40):
            ns = dice.randrange(4 * MS)
            clock.pass_ns(ns)
            covered_ns += ns
            work.record_step(step, ns / 1e6, 100)
            summary = summarize_ledger(tmp_path)
            assert min(summary.unattributed_ms, *summary.gpu_ms_by_bucket.values()) >= 0
        work.close(clean=dice.random() < 0.5)
    stepped = summary.productive_ms + summary.rolled_back_ms
    assert summary.allocated_ms == stepped + sum(summary.gpu_ms_by_bucket.values()) + summary.unattributed_ms
    assert covered_ns / 1e6 * 3 - 3 * 3 < stepped <= covered_ns / 1e6 * 3


def test_productive_time_is_split_to_the_millisecond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, dice = Clock(), random.Random(0)
    monkeypatch.setattr(Instant, "now", clock.now)
    work = WorkJournal(tmp_path, ranks=7, attempt="a", budget=BUDGET)
    work.record_ready()
    assert not summarize_ledger(tmp_path).gpu_ms_by_term
    for step in range(1, 30):
        milliseconds = dice.randrange(1000)
        clock.pass_ns(milliseconds * MS)
        work.record_step(step, milliseconds, 100)
        us = {term: dice.randrange(10_000) for term in STEP_TIME_TERMS}
        step_us = sum(us.values()) + dice.randrange(10_000)
        work.record_step_time_terms(step, step_us, us | {"bubble": us["pipeline_wait"] // 3})
        summary = summarize_ledger(tmp_path)
        assert (
            sum(summary.gpu_ms_by_term.values()) == summary.productive_ms == sum(summary.gpu_ms_by_paper_term.values())
        )
        assert min(*summary.gpu_ms_by_term.values(), *summary.gpu_ms_by_paper_term.values()) >= 0
    assert summary.gpu_ms_by_paper_term["bubble"] == pytest.approx(
        summary.gpu_ms_by_term["pipeline_wait"] / 3, rel=0.01
    )
