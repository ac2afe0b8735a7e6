"""The benchmarks of FP8 on a machine without a GPU: they work, and say that there is nothing to measure."""

from __future__ import annotations

import sys

import pytest
import torch

from shoestring.benchmarks import fp8_accumulation, fp8_kernels, v3_layer


def test_the_layer_is_run_phase_by_phase() -> None:
    setting, device = v3_layer.small(), torch.device("cpu")
    model = v3_layer.build(setting, "reference", device)
    seconds = v3_layer.layer_seconds(model, setting, device)
    assert list(seconds) == list(v3_layer.TRACE_US)
    assert all(weight.grad is not None for weight in model.parameters())
    assert sum(v3_layer.TRACE_US.values()) == 31072  # what the trace spends on computing a layer pair


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_they_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    for benchmark in (fp8_kernels, v3_layer):
        benchmark.main()
        assert "nothing to measure here" in capsys.readouterr().out


def test_promotion_is_worth_ten_times_at_the_reports_length() -> None:
    assert fp8_accumulation.relative_error(4096, None) > 10 * fp8_accumulation.relative_error(4096, 128)
