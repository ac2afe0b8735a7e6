"""Where the stages of a model sit: pure arithmetic between (rank, chunk) and stage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """A way along the ranks: up is towards the next higher one; in a loop also from the last to the first.

    Neighbors send to each other at the same moment, so each direction has a process group of its own.
    """

    UP = "up"
    DOWN = "down"

    @property
    def opposite(self) -> Direction:
        """The other way: gradients travel opposite to the activations of their chunk."""
        return Direction.DOWN if self is Direction.UP else Direction.UP


class Route(StrEnum):
    """The way of a micro-batch through the ranks."""

    LOOP = "loop"  # up through chunk 0 of every rank, from the last rank back to the first, up through chunk 1, …
    V = "v"  # up through chunk 0 of every rank, then down through chunk 1; the turn is on the last rank
    BIDIRECTIONAL = "bidirectional"  # two copies of the model: micro-batches of chunk 0 go up, those of chunk 1 down


@dataclass(frozen=True, slots=True)
class StagePlace:
    """A stage of the model on one rank: `chunk` counts the stages that the rank holds."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Placement:
    """Which stage of the model each (rank, chunk) is: 0 has the embedding, `stages` - 1 the head and the loss.

        loop            stages = ranks · chunks     stage = chunk · ranks + rank
        v               stages = 2 · ranks          stage = rank in chunk 0, 2 · ranks - 1 - rank in chunk 1
        bidirectional   stages = ranks, each twice  stage = rank in chunk 0, ranks - 1 - rank in chunk 1

    A micro-batch visits every stage once. Only under `bidirectional` do two places hold the same stage: they are
    replicas, and a micro-batch goes through either the one or the other, by the direction it travels in.
    """

    route: Route
    ranks: int
    chunks: int
    """Stages a rank holds."""

    @property
    def stages(self) -> int:
        """Stages that the model is cut into."""
        return self.ranks if self.route is Route.BIDIRECTIONAL else self.ranks * self.chunks

    def direction(self, chunk: int) -> Direction:
        """The way that the activations of `chunk` travel. Its gradients go the opposite way."""
        down = chunk == 1 and self.route is not Route.LOOP
        return Direction.DOWN if down else Direction.UP

    def stage(self, place: StagePlace) -> int:
        """The stage at `place`."""
        if self.direction(place.chunk) is Direction.DOWN:
            return self.stages - 1 - place.rank
        return place.chunk * self.ranks + place.rank if self.route is Route.LOOP else place.rank

    def before(self, place: StagePlace) -> StagePlace | None:
        """Where a micro-batch that is at `place` has been before; None in the first stage. May be the same rank."""
        return self._step(place, -1)

    def after(self, place: StagePlace) -> StagePlace | None:
        """Where a micro-batch that is at `place` goes next; None in the last stage. May be the same rank."""
        return self._step(place, +1)

    def is_first(self, place: StagePlace) -> bool:
        """Whether `place` holds the embedding and is given tokens."""
        return self.stage(place) == 0

    def is_last(self, place: StagePlace) -> bool:
        """Whether `place` holds the head and computes the loss."""
        return self.stage(place) == self.stages - 1

    def holders(self, stage: int) -> tuple[StagePlace, ...]:
        """Every place that holds `stage`, lowest rank first: one, or the two replicas of a bidirectional placement."""
        return tuple(place for place in self.places() if self.stage(place) == stage)

    def places(self) -> tuple[StagePlace, ...]:
        """Every (rank, chunk), rank by rank."""
        return tuple(StagePlace(rank, chunk) for rank in range(self.ranks) for chunk in range(self.chunks))

    def shares_ends(self) -> bool:
        """Whether first and last stage are on one rank everywhere, so that they can share embedding and head."""
        return {place.rank for place in self.holders(0)} == {place.rank for place in self.holders(self.stages - 1)}

    def _step(self, place: StagePlace, step: int) -> StagePlace | None:
        stage = self.stage(place) + step
        if not 0 <= stage < self.stages:
            return None
        if self.route is Route.LOOP:
            return StagePlace(stage % self.ranks, stage // self.ranks)
        if self.route is Route.V:
            return StagePlace(stage, 0) if stage < self.ranks else StagePlace(self.stages - 1 - stage, 1)
        return StagePlace(stage if place.chunk == 0 else self.ranks - 1 - stage, place.chunk)
