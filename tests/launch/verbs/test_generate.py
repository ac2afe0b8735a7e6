"""`shoestring generate` from an unusable checkpoint."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoestring.tests.launch.command_line import shoestring, tree_of
from shoestring.tests.launch.small_checkpoint import SHAPE, TEXT, model, part, reseal
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.data.tokenizer import train_tokenizer
from shoestring.trainer.model.config import YarnConfig
from shoestring.trainer.model.model import Model, initialize_weights


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, "word"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}, "word"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
                            "invert": False}}, "x" * 60),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_encode_is_named(
    values: dict[str, object], prompt: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = part(run).parent / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    raw = path.read_bytes()
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    reseal(path.parent, lambda tree: tree["attachments"][0].update(entry))
    code, _, errors = shoestring(capsys, "generate", run, "--prompt", prompt, "--tokens", "1")
    assert code == 2
    assert "tokenizer.json" in errors
    assert "cannot encode this text" in errors


@pytest.mark.parametrize("values", [{"routed_scaling_factor": 1e300}, {"rope_scaling": YarnConfig(mscale=1e300)}])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_one_error(
    values: dict[str, Any], temperature: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(replace(SHAPE, **values))
    initialize_weights(model, 1)
    attachments = {"tokenizer.json": train_tokenizer([TEXT], 300).raw}
    save_model(model, tmp_path / "checkpoints", 4, attachments)
    how = ["--prompt", "word1", "--tokens", 2, "--temperature", temperature]
    code, _, errors = shoestring(capsys, "generate", tmp_path, *how)
    assert code == 2
    assert "300 of 300 logits are not finite; take another checkpoint" in errors


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_a_temperature_that_is_none_is_refused(
    temperature: str, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["generate", original / "run", "--prompt", "word1", "--tokens", 2, f"--temperature={temperature}"]
    code, _, errors = shoestring(capsys, *verb)
    assert (code, "--temperature = " in errors) == (2, True)


def test_generate_prints_text_and_the_acceptance_of_drafts(
    saves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy: list[str | Path] = [
        "generate",
        saves,
        "--prompt",
        "word1 word2",
        "--tokens",
        "12",
        "--temperature",
        "0",
    ]
    code, drafted, counts = shoestring(capsys, *greedy)
    assert code == 0
    assert drafted.startswith("word1 word2")
    assert "acceptance rate" in counts
    code, plain, counts = shoestring(capsys, *greedy, "--no-draft")
    assert plain == drafted
    assert "nothing was drafted" in counts
    assert tree_of(capsys, *greedy)["text"] == drafted.removesuffix("\n")
    code, _, errors = shoestring(capsys, "generate", saves, "--prompt", "", "--tokens", "0")
    assert code == 2
    assert "--prompt" in errors
    assert "--tokens" in errors
    save_model(model(1), tmp_path / "bare")
    code, _, errors = shoestring(capsys, "generate", tmp_path / "bare", "--prompt", "word")
    assert code == 2
    assert "has no tokenizer.json" in errors
