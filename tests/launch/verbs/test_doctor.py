"""`shoestring doctor` reports what this machine has and marks what was never run on hardware."""

import json
import os

import pytest
import torch

from shoestring.launch.cli import main
from shoestring.launch.verbs.doctor import (
    AUTO_ATTENTION_NOTE,
    AUTO_FP8_NOTE,
    NOT_RUN_ON_HARDWARE,
    Implementation,
    effective_settings,
    list_implementations,
)
from shoestring.tests.launch.command_line import answer_of
from shoestring.tests.launch.renderings import check_renderings
from shoestring.trainer.model.attention_backend import GpuCapabilities
from shoestring.trainer.precision import backend as provider


def test_json_and_table_agree(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for form in ("json", "table"):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", "--format", form])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        if form == "json":
            assert [each["implementation"] for each in json.loads(printed)["implementations"]] == [
                f.implementation for f in list_implementations()
            ]
        else:
            assert all(finding.implementation in printed for finding in list_implementations())
            assert "pip install transformer-engine[pytorch], 2.20" in printed  # brackets are not markup
    check_renderings(answer_of("doctor"), smallest_number_of_quantities=0)


def test_the_backend_that_auto_takes_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken() -> list[str]:
        return [finding.implementation for finding in list_implementations() if AUTO_FP8_NOTE in finding.note]

    assert taken() == ["reference"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(provider, "unavailable_reasons", lambda name, on_gpu: iter(["no"] if name == "triton" else []))
    assert taken() == ["torch"]


def test_attention_is_judged_by_the_released_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention() -> dict[str, Implementation]:
        return {
            finding.implementation: finding for finding in list_implementations() if finding.operation == "attention"
        }

    found = attention()
    assert found["blocks"].available
    assert not found["cudnn"].available
    assert "it needs a GPU" in found["cudnn"].note
    assert NOT_RUN_ON_HARDWARE in found["cudnn"].note
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(
        GpuCapabilities, "detect", lambda: GpuCapabilities((9, 0), 92000, "flash_attn_interface is not installed")
    )
    found = attention()
    assert [name for name, finding in found.items() if AUTO_ATTENTION_NOTE in finding.note] == ["cudnn"]
    assert {name for name, finding in found.items() if finding.available} == {"blocks", "cudnn", "efficient"}
    assert "8.6 GB" in found["math"].note


def test_every_setting_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    theirs = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}
    found = {setting.name: setting for setting in effective_settings(theirs)}
    assert (found["NCCL_DEBUG"].value, found["NCCL_DEBUG"].set_by) == (
        "INFO",
        "environment; shoestring: NCCL_DEBUG=WARN",
    )
    assert found["OMP_NUM_THREADS"].set_by == "environment, same as shoestring"
    assert found["TORCH_CPP_LOG_LEVEL"].set_by == "shoestring"
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"].set_by == "not set: for GPUs"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = {setting.name: setting for setting in effective_settings(theirs)}
    assert (found["CUDA_DEVICE_MAX_CONNECTIONS"].value, found["CUDA_DEVICE_MAX_CONNECTIONS"].set_by) == (
        "32",
        "shoestring",
    )
    assert found["max_ctas of P2P groups"].value == "4"
    assert all(setting.reason for setting in found.values())


def test_what_was_never_run_says_so() -> None:
    found = {finding.implementation: finding for finding in list_implementations()}
    assert NOT_RUN_ON_HARDWARE in found["deepep"].note
    assert NOT_RUN_ON_HARDWARE in found["two_hop"].note
    assert found["gloo"].available
    assert found["reference"].available
    assert NOT_RUN_ON_HARDWARE in found["triton"].note
    assert NOT_RUN_ON_HARDWARE in found["torch"].note
    assert NOT_RUN_ON_HARDWARE in found["te"].note
    assert NOT_RUN_ON_HARDWARE in found["Apex's wgrad_gemm_accum_fp32"].note


def test_it_looks_before_it_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H800")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert "3 x H800" in list_implementations()[0].note
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    cluster = list_implementations()[-1]
    assert not cluster.available
    assert "must be root" in cluster.note
