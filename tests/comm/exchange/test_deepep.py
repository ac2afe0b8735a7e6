"""DeepEP's adapter against a stand-in: the numbers of `flat`, the published signatures, and refused configurations."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.errors import CollectiveError
from shoestring.comm.exchange import deepep
from shoestring.comm.exchange.api import TokenExchange
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.deepep import deepep_problems
from shoestring.comm.exchange.deepep_buffer import DeepEPBufferShape
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.fp8 import dequantize
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import TrafficCounter
from shoestring.launch.compose import compose_run_config
from shoestring.tests.comm.exchange import deep_ep_stand_in, routing
from shoestring.tests.comm.exchange.deep_ep_package import GOOD, write_deep_ep
from shoestring.tests.comm.exchange.routing import CASES, EXPERTS, LABEL, batch_of, relative_error, through_experts
from shoestring.tests.processes import World, run_processes

WIDTH = 256  # DeepEP moves whole 256 elements; this is two tiles, which do not fill an int32 of scales
MOST_TOKENS = 16
GRIDS = [(1, 2), (2, 2), (2, 1)]
FP8 = ExchangeConfig(name="deepep", dispatch="fp8", combine="bf16", combine_backward="fp8", dispatch_backward="bf16")
BF16 = replace(FP8, dispatch="bf16", combine_backward="bf16")
FORMATS = {"bf16": (torch.bfloat16, BF16), "fp8": (torch.bfloat16, FP8), "fp8 of fp32": (torch.float32, FP8)}
# Both round alike towards the experts. On combine DeepEP rounds each rank's sum and the result, flat each copy
# and, in BF16, the result: by 2^-9 each at most.
BOUND = 4 * 2**-9


def opened(
    world: World, gpus_per_node: int, config: ExchangeConfig
) -> tuple[TokenExchange[Any], TrafficCounter, Topology]:
    """Build the exchange that `config` names, over all ranks, for rows of this file's width. Collective."""
    routing.WIDTH = WIDTH
    topology = Topology(ep=world.size, gpus_per_node=gpus_per_node)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    worker, traffic = build_async_communicator(groups.ep, torch.device("cpu")), TrafficCounter(topology, world.rank)
    top_k = max(case.top_k for case in CASES)
    shape = DeepEPBufferShape(MOST_TOKENS, WIDTH, top_k)
    return build_token_exchange(config, groups, EXPERTS, worker, traffic, shape), traffic, topology


def compare(world: World, gpus_per_node: int) -> dict[tuple[str, str, str], float]:
    """Return the relative error against flat for each format, case and tensor. Both routings must be equal."""
    deep_ep_stand_in.install()
    errors = {}
    for form, (dtype, config) in FORMATS.items():
        ours, traffic, topology = opened(world, gpus_per_node, config)
        reference, _, _ = opened(world, gpus_per_node, replace(config, name="flat"))
        for case in CASES:
            batch = batch_of(case, topology, world.rank, dtype)
            theirs = dict(through_experts(reference, batch, topology, world.rank))
            for name, tensor in through_experts(ours, batch, topology, world.rank):
                assert tensor.dtype == theirs[name].dtype
                errors[form, case.name, name] = relative_error(tensor, theirs[name])
            one, other = (
                exchange.dispatch(batch.tokens_TD, batch.weights_TK, batch.experts_TK, LABEL).wait()
                for exchange in (ours, reference)
            )
            assert one.rows_per_expert_L == other.rows_per_expert_L
            assert one.token_counts == other.token_counts
            assert one.label == LABEL
            assert one.gate_weights_R.dtype == other.gate_weights_R.dtype
            in_fp8 = ours.dispatch(
                batch.tokens_TD, batch.weights_TK, batch.experts_TK, LABEL, keep_quantized=True
            ).wait()
            assert (in_fp8.quantized_rows is not None) == (config.dispatch == "fp8")
            if in_fp8.quantized_rows is not None:
                rows_RD = dequantize(in_fp8.quantized_rows.values_XD, in_fp8.quantized_rows.exponents_XQ, dtype)
                assert torch.equal(rows_RD.sort(dim=0).values, one.rows_RD.sort(dim=0).values)  # in any order
                assert in_fp8.rows_RD.isnan().all()
        assert not traffic.bytes_sent  # unknown counts are not counted
    return errors


@pytest.mark.parametrize(("nodes", "gpus_per_node"), GRIDS)
def test_equals_flat(nodes: int, gpus_per_node: int) -> None:
    for errors in run_processes(nodes * gpus_per_node, compare, gpus_per_node, timeout=120):
        wrong = {key: error for key, error in errors.items() if not error <= BOUND}
        assert not wrong
        assert len(errors) == len(FORMATS) * len(CASES) * 4


def calls(world: World, config: ExchangeConfig) -> list[tuple[str, dict[str, str]]]:
    """Return one layer's calls to DeepEP: tensors as dtype and shape, default arguments left out."""
    log = deep_ep_stand_in.install()
    exchange, _, topology = opened(world, 2, config)
    dict(through_experts(exchange, batch_of(CASES[3], topology, world.rank, torch.bfloat16), topology, world.rank))
    return [(name, {key: described(value) for key, value in given.items() if value}) for name, given in log_of(log)]


def log_of(log: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the log with tensors wrapped in tuples, because the truth value of a tensor is undefined."""
    for name, arguments in log:
        yield name, {key: (value,) if isinstance(value, Tensor) else value for key, value in arguments.items()}


def described(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in value)
    return "handle" if isinstance(value, deep_ep_stand_in.EPHandle) else str(value)


def test_what_deep_ep_is_asked_for() -> None:
    """Rank 0 sends 5 tokens to 4 experts each. The handle carries the layout to every call after its dispatch."""
    opening, dispatch, combine, combine_backward, dispatch_backward = run_processes(2, calls, FP8)[0]
    assert opening == (
        "open",
        {
            "num_max_tokens_per_rank": "16",
            "hidden": "256",
            "num_topk": "8",
            "use_fp8_dispatch": "True",
            "allow_hybrid_mode": "True",
            "allow_multiple_reduction": "True",
            "prefer_overlap_with_compute": "True",
            "sl_idx": "3",
            "num_cpu_timeout_secs": "30",
            "num_gpu_timeout_secs": "30",
            "explicitly_destroy": "True",
        },
    )
    how = {"async_with_compute_stream": "True", "do_expand": "True", "do_handle_copy": "True"}
    rows = {"x": "float8_e4m3fn[5, 256] int32[5, 1]"}
    first = {
        "topk_idx": "int64[5, 4]",
        "topk_weights": "float32[5, 4]",
        "num_experts": "16",
        "num_max_tokens_per_rank": "16",
        "expert_alignment": "1",
    }
    assert dispatch == ("dispatch", {**rows, **first, **how})
    assert combine_backward == ("dispatch", {**rows, "handle": "handle", "num_sms": "24", **how})
    received = combine[1]["x"].removeprefix("bfloat16[").removesuffix(", 256]")
    back = {"x": f"bfloat16[{received}, 256]", "handle": "handle", "async_with_compute_stream": "True"}
    assert combine == ("combine", back)
    assert dispatch_backward == ("combine", {**back, "topk_weights": f"float32[{received}]"})


def test_between_nodes_the_number_of_sms_is_ours() -> None:
    for per_rank in run_processes(4, calls, BF16):
        asked = [given.get("num_sms") for name, given in per_rank if name == "dispatch"]
        assert asked == ["6", "6"]
        assert per_rank[0][1].get("use_fp8_dispatch") is None


def too_many(world: World) -> str:
    deep_ep_stand_in.install()

    def refuse(*arguments: object, **named: object) -> None:
        raise RuntimeError("Assertion exception (csrc/elastic/buffer.hpp:762): num_tokens <= num_max_tokens_per_rank")

    exchange, _, topology = opened(world, 2, FP8)
    batch = batch_of(CASES[0], topology, world.rank, torch.bfloat16)
    deep_ep_stand_in.ElasticBuffer.dispatch = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(CollectiveError) as failed:
        exchange.dispatch(batch.tokens_TD, batch.weights_TK, batch.experts_TK, LABEL).wait()
    return str(failed.value)


def test_a_failure_says_what_failed() -> None:
    message = run_processes(2, too_many)[0]
    assert message.startswith("rank 0: dispatch of layer_01, micro-batch 2 with ranks 1 failed")
    assert message.endswith("num_tokens <= num_max_tokens_per_rank")


def test_nothing_is_imported_before_it_is_opened() -> None:
    assert "deep_ep" not in sys.modules


FITS = {
    "shape": DeepEPBufferShape(4096, 7168, 8),
    "ranks": 8,
    "dtype": torch.bfloat16,
    "device": "auto",
    "local_ranks": 2,
}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with two Hopper GPUs, NCCL and DeepEP, which this process must not import."""
    package = write_deep_ep(tmp_path, GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(deepep, "loaded_nccl_version", lambda: (2, 30, 4))
    return package


def hints(**changed: Any) -> str:
    problems = list(deepep_problems(**{**FITS, **changed}))
    assert {(problem.field, problem.value) for problem in problems} <= {("exchange.name", "deepep")}
    assert all(problem.hint.endswith(", or write exchange=two_hop") for problem in problems)
    return " | ".join(problem.hint for problem in problems)


def test_what_fits_is_not_refused(hopper: Path) -> None:
    assert hints() == ""


def test_what_is_impossible_everywhere(hopper: Path) -> None:
    assert "nothing to exchange; write exchange=flat" in hints(ranks=1)
    assert "a multiple of 256, not 160" in hints(shape=DeepEPBufferShape(4096, 160, 8))
    assert "at most 32 experts and these go to 33" in hints(shape=DeepEPBufferShape(4096, 7168, 33))
    assert "gates in FP32" in hints(dtype=torch.float64)


def test_what_a_machine_lacks(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "each of 2 ranks needs a Hopper GPU and training.device is cpu" in hints(device="cpu")
    assert "each of 3 ranks needs a Hopper GPU and this machine has 2" in hints(local_ranks=3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 0))
    monkeypatch.setattr(deepep, "loaded_nccl_version", lambda: (2, 28, 9))
    (hopper / "buffers" / "elastic.py").unlink()
    found = hints()
    assert "has no ElasticBuffer; build version 2 of github.com/deepseek-ai/DeepEP" in found
    assert "needs a Hopper GPU (compute capability 9.0) and a GPU here has 8.0" in found
    assert "needs NCCL 2.30.4 and 2.28.9 is here" in found
    assert "importing deep_ep fails" not in found  # it would, for these reasons


def test_what_its_import_asserts_is_said(hopper: Path) -> None:
    assert "deep_ep" not in sys.modules
    (hopper / "__init__.py").write_text("assert False, 'Duplicate NCCL runtime found'\n")
    found = hints()
    assert "importing deep_ep fails: AssertionError: Duplicate NCCL runtime found; run pip install --no-deps" in found
    assert '"nvidia-nccl-cu13>=2.30.4"' in found
    assert "deep_ep" not in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_this_machine_is_refused() -> None:
    found = hints()
    assert "deep_ep is not installed; build version 2" in found
    assert "each of 2 ranks needs a Hopper GPU and this machine has 0" in found
    assert deepep.loaded_nccl_version() == ()


def test_the_shipped_configuration_and_formats_without_kernels() -> None:
    assert compose_run_config(["exchange=deepep", "experiment=quickstart"]).exchange == FP8
    assert not list(BF16.problems())
    native = {problem.field: problem for problem in ExchangeConfig(name="deepep").problems()}
    assert set(native) == {"dispatch", "combine", "combine_backward", "dispatch_backward"}
    assert "DeepEP moves BF16" in native["combine"].hint
    (mixed,) = replace(FP8, combine_backward="bf16").problems()
    assert mixed.field == "combine_backward"
    assert mixed.hint.startswith("must be fp8, like dispatch")
