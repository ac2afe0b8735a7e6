"""Creation of groups with NCCL: one split of the default group."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoestring.comm import group_factory as open_groups
from shoestring.comm.group_factory import NcclGroupFactory

LIMIT = timedelta(seconds=1)


class Splitting:
    """torch's default group over NCCL, as far as a split uses it."""

    def __init__(self) -> None:
        self.options = SimpleNamespace(config=SimpleNamespace(max_ctas=None))
        self.asked: list[dict[str, Any]] = []

    def _get_backend(self, device: torch.device) -> "Splitting":
        return self

    def split_group(self, **asked: Any) -> str:
        self.asked.append(asked)
        return "handle"


def test_nccl_splits_the_default_group_with_its_options_and_fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Splitting()
    library = SimpleNamespace(group=SimpleNamespace(WORLD=default), split_group=default.split_group)
    monkeypatch.setattr(open_groups, "dist", library)
    make = NcclGroupFactory(torch.device("cuda", 0), 3, LIMIT)
    for blocks in (4, None):
        communicator = make.split_group("rings", [(0, 1), (2, 3)], blocks)
        assert communicator is not None
        assert str(communicator.process_group) == "handle"
        asked = default.asked[-1]
        assert asked["pg_options"].config.max_ctas == blocks
        assert (asked["split_ranks"], asked["timeout"], asked["group_desc"]) == ([[0, 1], [2, 3]], LIMIT, "rings")
    assert default.options.config.max_ctas is None  # other groups do not inherit it
    assert make.creation_calls == 3
