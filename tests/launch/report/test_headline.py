"""The first lines of a report."""

from pathlib import Path

import pytest

from shoestring.tests.launch.report.reader import Reader
from shoestring.trainer.ledger.summary import summarize_ledger


def test_the_headline(run_dir: Path, page: Reader) -> None:
    summary = summarize_ledger(run_dir)
    assert summary.gpu_hours == pytest.approx((10 * 324 + 360) * 2 / 3600)  # eight steps, two done twice, evaluation
    for words in (
        "done",
        "validation loss 4.500 nats/token step 8; unigram entropy 5.830",
        "tokens retained 8.0k of 400.0k configured; 2.0k undone or skipped",
        "GPU-hours 2.0000 50.0 % of the budget of 4.0000",
        "GPU-hours per trillion tokens 250,000,000 DeepSeek-V3: 180,000",
        "goodput 72.0 %",
        "MFU 25.0 % median; 2.0k tokens/s",
        "3.5M parameters, 1.7M active per token",
        "pp 2, edp 1, ep 2; dualpipev; token dispatcher flat",
    ):
        assert words in page.words()
