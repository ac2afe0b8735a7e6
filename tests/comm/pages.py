"""Stand-ins for CUDA where memory is pinned."""

from dataclasses import dataclass, field


@dataclass
class StandInPages:
    """A pinner that refuses what CUDA refuses: pinning memory twice, or unpinning memory that is not pinned."""

    error: int = 0
    pinned: dict[int, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def pin(self, pointer: int, size: int) -> int:
        assert pointer not in self.pinned
        self.pinned[pointer] = size
        self.log.append("pin")
        return self.error

    def unpin(self, pointer: int) -> int:
        del self.pinned[pointer]
        self.log.append("unpin")
        return 0
