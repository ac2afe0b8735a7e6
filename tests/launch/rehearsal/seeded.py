"""The process of a rehearsed rank, with a fault if it is one of the named ranks: …seeded FAULT RANK,RANK SPEC OUT.

The code of the run is changed in this process before its rank is built.
"""

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from shoestring.launch.rehearsal import rank


def main(arguments: Sequence[str]) -> None:
    fault, faulty, spec, output = arguments
    described = json.loads(Path(spec).read_text())
    if described["rank"] in map(int, faulty.split(",")):
        ctypes.CDLL(described["shim"], mode=ctypes.RTLD_GLOBAL)  # before the patched modules import torch
        FAULTS[fault]()
    rank.main([spec, output])


def host_tensor() -> None:
    """Let the router add a host tensor to its affinities."""
    import torch

    from shoestring.trainer.model.router import Router

    select = Router._select

    def faulty(router: Router, affinity_TE: torch.Tensor) -> torch.Tensor:
        return select(router, affinity_TE + torch.zeros(affinity_TE.shape[1]))

    mock.patch.object(Router, "_select", faulty).start()


def message_shape() -> None:
    """Let receives expect twice the sequences."""
    import torch

    from shoestring.trainer.model.chunk import Chunk

    message = Chunk.empty_activation

    def faulty(chunk: Chunk, sequences: int, length: int, device: torch.device) -> torch.Tensor:
        return message(chunk, 2 * sequences, length, device)

    mock.patch.object(Chunk, "empty_activation", faulty).start()


def swapped_collectives() -> None:
    """Sum gradient buckets in another order than the other ranks."""
    from shoestring.parallelism.zero.reduce import GradientReducer

    def faulty(reducer: GradientReducer, buckets: Sequence[Any], final_after: Sequence[int], *others: Any) -> None:
        build(reducer, buckets[::-1], final_after[::-1], *others)

    build = GradientReducer.__init__
    mock.patch.object(GradientReducer, "__init__", faulty).start()


def no_send() -> None:
    """Leave out the first send of the step."""
    from shoestring.parallelism.pipeline.executor import PipelineExecutor

    derived = vars(PipelineExecutor)["p2p_batches"]

    def faulty(executor: PipelineExecutor) -> Sequence[Any]:
        commits = list(derived.func(executor))
        first = next(index for index, commit in enumerate(commits) if commit.sends)
        commits[first] = replace(commits[first], sends=())
        return tuple(commits)

    mock.patch.object(PipelineExecutor, "p2p_batches", property(faulty)).start()


def no_warm_up() -> None:
    """Connect no pair of pipeline ranks before the step."""
    from shoestring.parallelism.pipeline.executor import PipelineExecutor

    mock.patch.object(PipelineExecutor, "connect_neighbors", return_value=None).start()


FAULTS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (host_tensor, message_shape, swapped_collectives, no_send, no_warm_up)
}

if __name__ == "__main__":
    main(sys.argv[1:])
