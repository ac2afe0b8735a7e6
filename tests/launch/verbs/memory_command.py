"""`shoestring memory` on a small model."""

from typing import Any

import pytest

from shoestring.tests.launch.command_line import tree_of

SMALL = ("model=tiny", "model.num_hidden_layers=2", "training.sequence_length=32", "training.global_batch_size=4")


def tree(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return tree_of(capsys, "memory", *arguments)
