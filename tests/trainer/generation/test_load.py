"""A whole model from a checkpoint, in one process."""

from pathlib import Path

import torch

from shoestring.tests.launch.small_checkpoint import model
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.generation.load import load_chunk_for_inference


def test_weights_and_biases_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    saved = model(1)
    for parameter in saved.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for _, router in saved.routers():
        router.bias_E.uniform_(-1, 1)
    loaded = load_chunk_for_inference(
        save_model(saved, tmp_path / "checkpoints"), torch.device("cpu"), torch.float32
    ).model
    for (name, ours), theirs in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    for (name, ours_R), (_, theirs_R) in zip(saved.routers(), loaded.routers(), strict=True):
        assert torch.equal(ours_R.bias_E, theirs_R.bias_E), name
