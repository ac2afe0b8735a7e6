"""Placement of stages on ranks: arithmetic between (rank, chunk) and stage."""

from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """Direction along the pipeline ranks: to the next rank, in a loop also from the last to the first, or the previous.

    Each direction has a separate process group, because neighbors send to each other at the same moment.
    """

    NEXT = "next"
    PREV = "prev"

    @property
    def opposite(self) -> "Direction":
        """The other direction, in which the gradients of a chunk travel."""
        return Direction.PREV if self is Direction.NEXT else Direction.NEXT


class PlacementStyle(StrEnum):
    """Path of a micro-batch through the ranks."""

    LOOP = "loop"  # through chunk 0 of every rank, from the last rank to the first, through chunk 1, and so on
    V = "v"  # through chunk 0 of every rank, then back through chunk 1; the turn is on the last rank
    BIDIRECTIONAL = "bidirectional"  # two copies of the model: chunk 0 from the first rank on, chunk 1 from the last


@dataclass(frozen=True, slots=True)
class StageLocation:
    """Location of a stage: a rank and one of its chunks."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class StagePlacement:
    """Mapping of (rank, chunk) to stage: stage 0 has the embedding, the last one the head and the loss.

        loop            stages = ranks · chunks     stage = chunk · ranks + rank
        v               stages = 2 · ranks          stage = rank in chunk 0, 2 · ranks - 1 - rank in chunk 1
        bidirectional   stages = ranks, each twice  stage = rank in chunk 0, ranks - 1 - rank in chunk 1

    A micro-batch visits every stage once. Only in `bidirectional` do two locations hold the same stage: they are
    replicas, and the direction of a micro-batch selects one of them.
    """

    style: PlacementStyle
    ranks: int
    chunks_per_rank: int
    """Stages per rank."""

    @property
    def num_stages(self) -> int:
        """Number of stages of the model."""
        return self.ranks if self.style is PlacementStyle.BIDIRECTIONAL else self.ranks * self.chunks_per_rank

    def direction_of_chunk(self, chunk: int) -> Direction:
        """Return the direction of the activations of `chunk`; its gradients take the opposite one."""
        goes_back = chunk == 1 and self.style is not PlacementStyle.LOOP
        return Direction.PREV if goes_back else Direction.NEXT

    def stage_at(self, place: StageLocation) -> int:
        """Return the stage at `place`."""
        if self.direction_of_chunk(place.chunk) is Direction.PREV:
            return self.num_stages - 1 - place.rank
        return place.chunk * self.ranks + place.rank if self.style is PlacementStyle.LOOP else place.rank

    def previous_location(self, place: StageLocation) -> StageLocation | None:
        """Return the location of the stage before that of `place`, maybe on the same rank; None for the first stage."""
        return self._step(place, -1)

    def next_location(self, place: StageLocation) -> StageLocation | None:
        """Return the location of the stage after that of `place`, maybe on the same rank; None for the last stage."""
        return self._step(place, +1)

    def is_first_stage(self, place: StageLocation) -> bool:
        """Return whether `place` holds the embedding."""
        return self.stage_at(place) == 0

    def is_last_stage(self, place: StageLocation) -> bool:
        """Return whether `place` holds the head and computes the loss."""
        return self.stage_at(place) == self.num_stages - 1

    def locations_of_stage(self, stage: int) -> tuple[StageLocation, ...]:
        """Return the locations of `stage`, lowest rank first: one, or two replicas in `bidirectional`."""
        return tuple(place for place in self.all_locations() if self.stage_at(place) == stage)

    def all_locations(self) -> tuple[StageLocation, ...]:
        """Return every (rank, chunk), rank by rank."""
        return tuple(StageLocation(rank, chunk) for rank in range(self.ranks) for chunk in range(self.chunks_per_rank))

    def first_and_last_stage_colocated(self) -> bool:
        """Return whether the first and the last stage are on the same ranks."""
        # If so, MTP can share embedding and head in place (report §3.2.3); else their gradients need a reduction.
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
