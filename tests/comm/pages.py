"""Stand-ins for CUDA where memory is pinned."""

from dataclasses import dataclass, field


@dataclass
class StandInPages:
    """A CUDA runtime that refuses what CUDA refuses: pinning memory twice, or unpinning memory that is not pinned."""

    error: int = 0
    pinned: dict[int, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802 -- the name in torch
        assert pointer not in self.pinned
        self.pinned[pointer] = size
        self.log.append("pin")
        return self.error

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802 -- the name in torch
        del self.pinned[pointer]
        self.log.append("unpin")
        return 0
