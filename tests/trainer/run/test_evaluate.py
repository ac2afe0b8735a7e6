"""The validation loss: every target once, on any number of ranks."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.reference.deepseek_v3 import losses
from shoestring.tests.trainer.model.released import make_chunk
from shoestring.trainer.build import PipelineRuntime
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.prepared import open_prepared_directory
from shoestring.trainer.data.samples import SampleDataset
from shoestring.trainer.generation.generate import generate
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.run.evaluate import evaluate_validation_loss

CONFIG = replace(reference_configs()["full"], vocab_size=270)
LENGTH = 16


def validation_samples(prepared: str) -> SampleDataset:
    opened = open_prepared_directory(Path(prepared))
    return SampleDataset(opened.validation, LENGTH, CONFIG.num_nextn_predict_layers, opened.tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("data")
    (root / "corpus").mkdir()
    words = [f"word{index * 7919 % 101}" for index in range(600)]
    (root / "corpus" / "train.txt").write_text(" ".join(words))
    (root / "corpus" / "held.txt").write_text(" ".join(words[:70]))
    config = DataConfig(corpus=str(root / "corpus"), prepared=str(root / "out"), vocab_size=270, validation=("held",))
    prepare_corpus(config, lambda _: None)
    return str(root / "out")


def run_rank(world: World, topology: Topology, prepared: str) -> tuple[float, int, list[int]]:
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    chunk = make_chunk(CONFIG, random_params(CONFIG, 3, torch.float64), torch.float64, topology, world.rank)
    cpu = torch.device("cpu")
    forwards = PipelineRuntime(StageLayout.build(chunk.model.config, 8), groups, cpu).build_forward_executor
    found = evaluate_validation_loss((chunk,), forwards, validation_samples(prepared), 2, groups, cpu)
    text = generate((chunk,), forwards(1), [5, 6, 7], 6, 8, groups, cpu, seed=0)
    assert found is not None
    assert text is not None
    return *found, text


def test_every_target_counts_once_in_every_layout(prepared: str) -> None:
    samples = validation_samples(prepared)
    batch = samples.read_batch(range(len(samples)))
    expected = losses(random_params(CONFIG, 3, torch.float64), CONFIG, batch.tokens_BW, batch.valid_BW)
    ((loss, targets, text),) = run_processes(1, run_rank, Topology(), prepared)
    assert targets == samples.split.num_tokens - 1
    assert loss == pytest.approx(float(expected.main), rel=1e-12)
    assert len(samples) % 8  # the last round of four ranks with two sequences each is not full
    for other_loss, other_targets, other_text in run_processes(4, run_rank, Topology(ep=2, edp=2), prepared):
        assert (other_targets, other_text) == (targets, text)
        assert other_loss == pytest.approx(loss, rel=1e-12)
