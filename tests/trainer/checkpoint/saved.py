"""Checkpoints of untrained models, for tests that read them."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from shoestring.comm.groups import Group
from shoestring.tests.reference.deepseek_v3 import ReferenceConfig
from shoestring.tests.trainer.model.released import load_released, model_config
from shoestring.trainer.checkpoint.checkpoint import Checkpoint
from shoestring.trainer.checkpoint.pieces import EMA_STATE, MODEL_STATE
from shoestring.trainer.checkpoint.saver import CheckpointSaver
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore
from shoestring.trainer.checkpoint.training_state import ROUTER_BIAS_SUFFIX, model_pieces, model_tensor_shapes
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model

WORLD = Group((0,), None, 0, timedelta(seconds=1))


def save_model(
    model: Model,
    directory: Path,
    step: int = 0,
    attachments: Mapping[str, bytes] | None = None,
    average: Model | None = None,
) -> Checkpoint:
    facts = {"step": step, "config": {"model": asdict(model.config), "training": {"sequence_length": 32}}}
    directory.parent.mkdir(parents=True, exist_ok=True)  # the directory of the run
    store, saver = (
        CheckpointStore(directory, keep_last=9),
        CheckpointSaver(CheckpointStore(directory, keep_last=9), WORLD),
    )
    pieces = list(model_pieces(model))
    if average is not None:
        own = (piece for piece in model_pieces(average) if not piece.name.endswith(ROUTER_BIAS_SUFFIX))
        pieces += (replace(piece, name=EMA_STATE + piece.name.removeprefix(MODEL_STATE)) for piece in own)
    saver.begin_save(step, pieces, CheckpointExtras(facts, attachments or {}, names_of(model.config)))
    saved = saver.finish_save()
    saver.close()
    assert saved is not None
    assert saved.failure is None
    return store.open(step)


def names_of(config: ModelConfig) -> frozenset[str]:
    return frozenset(model_tensor_shapes(config))


def save_params(config: ReferenceConfig, params: Mapping[str, Tensor], directory: Path) -> Checkpoint:
    """Write a checkpoint of these parameters, which have their released names."""
    model = Model(model_config(config))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32)
    load_released(model, params)
    return save_model(model, directory)
