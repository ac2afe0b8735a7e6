"""The manifest of a checkpoint."""

import pytest

from shoestring.trainer.checkpoint.manifest import CheckpointManifest

NAN, INF = float("nan"), float("inf")


def test_a_manifest_is_not_written_with_what_no_reader_takes() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        CheckpointManifest({"loss": INF}, {}, (), {}).to_json()
