"""Refused preparations of a small corpus that leave nothing that looks like data."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus


def silent(line: str) -> None:
    pass


def refusal(config: DataConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_corpus(config, silent)
    assert not (Path(config.prepared) / "manifest.json").exists()
    return str(caught.value)
