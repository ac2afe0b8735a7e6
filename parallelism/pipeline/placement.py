"""Where the stages of a model sit: pure arithmetic between (rank, chunk) and stage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """A way along the ranks: up is towards the next higher one; in a loop also from the last to the first.

    Neighbors send to each other at the same moment, so each direction has a process group of its own.
    """

    NEXT = "next"
    PREV = "prev"

    @property
    def opposite(self) -> Direction:
        """The other way: gradients travel opposite to the activations of their chunk."""
        return Direction.PREV if self is Direction.NEXT else Direction.NEXT


class PlacementStyle(StrEnum):
    """The way of a micro-batch through the ranks."""

    LOOP = "loop"  # up through chunk 0 of every rank, from the last rank back to the first, up through chunk 1, …
    V = "v"  # up through chunk 0 of every rank, then down through chunk 1; the turn is on the last rank
    BIDIRECTIONAL = "bidirectional"  # two copies of the model: micro-batches of chunk 0 go up, those of chunk 1 down


@dataclass(frozen=True, slots=True)
class StageLocation:
    """A stage of the model on one rank: `chunk` counts the stages that the rank holds."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class StagePlacement:
    """Which stage of the model each (rank, chunk) is: 0 has the embedding, `stages` - 1 the head and the loss.

        loop            stages = ranks · chunks     stage = chunk · ranks + rank
        v               stages = 2 · ranks          stage = rank in chunk 0, 2 · ranks - 1 - rank in chunk 1
        bidirectional   stages = ranks, each twice  stage = rank in chunk 0, ranks - 1 - rank in chunk 1

    A micro-batch visits every stage once. Only under `bidirectional` do two places hold the same stage: they are
    replicas, and a micro-batch goes through either the one or the other, by the direction it travels in.
    """

    style: PlacementStyle
    ranks: int
    chunks_per_rank: int
    """Stages a rank holds."""

    @property
    def num_stages(self) -> int:
        """Stages that the model is cut into."""
        return self.ranks if self.style is PlacementStyle.BIDIRECTIONAL else self.ranks * self.chunks_per_rank

    def direction_of_chunk(self, chunk: int) -> Direction:
        """The way that the activations of `chunk` travel. Its gradients go the opposite way."""
        down = chunk == 1 and self.style is not PlacementStyle.LOOP
        return Direction.PREV if down else Direction.NEXT

    def stage_at(self, place: StageLocation) -> int:
        """The stage at `place`."""
        if self.direction_of_chunk(place.chunk) is Direction.PREV:
            return self.num_stages - 1 - place.rank
        return place.chunk * self.ranks + place.rank if self.style is PlacementStyle.LOOP else place.rank

    def previous_location(self, place: StageLocation) -> StageLocation | None:
        """Where a micro-batch that is at `place` has been before; None in the first stage. May be the same rank."""
        return self._step(place, -1)

    def next_location(self, place: StageLocation) -> StageLocation | None:
        """Where a micro-batch that is at `place` goes next; None in the last stage. May be the same rank."""
        return self._step(place, +1)

    def is_first_stage(self, place: StageLocation) -> bool:
        """Whether `place` holds the embedding and is given tokens."""
        return self.stage_at(place) == 0

    def is_last_stage(self, place: StageLocation) -> bool:
        """Whether `place` holds the head and computes the loss."""
        return self.stage_at(place) == self.num_stages - 1

    def locations_of_stage(self, stage: int) -> tuple[StageLocation, ...]:
        """Every place that holds `stage`, lowest rank first: one, or the two replicas of a bidirectional placement."""
        return tuple(place for place in self.all_locations() if self.stage_at(place) == stage)

    def all_locations(self) -> tuple[StageLocation, ...]:
        """Every (rank, chunk), rank by rank."""
        return tuple(StageLocation(rank, chunk) for rank in range(self.ranks) for chunk in range(self.chunks_per_rank))

    def first_and_last_stage_colocated(self) -> bool:
        """Whether first and last stage are on one rank everywhere, so that they can share embedding and head."""
        return {place.rank for place in self.locations_of_stage(0)} == {
            place.rank for place in self.locations_of_stage(self.num_stages - 1)
        }

    def _step(self, place: StageLocation, step: int) -> StageLocation | None:
        stage = self.stage_at(place) + step
        if not 0 <= stage < self.num_stages:
            return None
        if self.style is PlacementStyle.LOOP:
            return StageLocation(stage % self.ranks, stage // self.ranks)
        if self.style is PlacementStyle.V:
            return StageLocation(stage, 0) if stage < self.ranks else StageLocation(self.num_stages - 1 - stage, 1)
        return StageLocation(stage if place.chunk == 0 else self.ranks - 1 - stage, place.chunk)
