"""The kernels that compute attention: where each one runs, refusals, and a choice that reaches every layer."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shoestring.comm.errors import Problem, collect_problems
from shoestring.launch.compose import compose_run_config
from shoestring.tests.launch.refusals import by_field, refused
from shoestring.trainer.model.attention import MultiHeadLatentAttention
from shoestring.trainer.model.attention_backend import (
    CPU_ATTENTION,
    GPU_BACKENDS,
    AttentionBackend,
    AttentionShape,
    GpuCapabilities,
    attention_by_name,
    choose_attention,
    probe_attention,
    select_attention,
    unsupported_gpu_reasons,
    unsupported_shape_reasons,
)
from shoestring.trainer.model.cpu_attention import causal_attention, causal_attention_reference
from shoestring.trainer.model.model import Model

V3 = AttentionShape(batch=1, heads=128, sequence_length=4096, qk_head_dim=192, v_head_dim=128, dtype=torch.bfloat16)
HOPPER = GpuCapabilities((9, 0), 92000, "flash_attn_interface is not installed")


def chosen(case: AttentionShape, gpu: GpuCapabilities) -> str:
    return select_attention("auto", case, gpu).name


def test_auto_takes_the_first_that_serves() -> None:
    assert chosen(V3, HOPPER) == "cudnn"
    old = replace(HOPPER, cudnn_version=91002)
    assert chosen(V3, old) == "efficient"
    assert chosen(V3, replace(old, flash3_unavailable_reason=None)) == "flash3"
    assert chosen(V3, replace(HOPPER, compute_capability=(8, 0))) == "efficient"
    assert chosen(replace(V3, qk_head_dim=128), replace(HOPPER, compute_capability=(8, 0))) == "cudnn"
    assert chosen(replace(V3, dtype=torch.float32), HOPPER) == "efficient"
    assert chosen(replace(V3, dtype=torch.float64, sequence_length=128), HOPPER) == "math"
    assert chosen(replace(V3, qk_head_dim=84, v_head_dim=84, sequence_length=128), HOPPER) == "math"


def test_the_reason_names_the_library_and_what_was_passed_over() -> None:
    assert "cuDNN 9.20.0" in str(select_attention("auto", V3, HOPPER))
    text = str(select_attention("auto", V3, replace(HOPPER, cudnn_version=91002)))
    assert text.startswith(
        "efficient (torch's memory-efficient kernel, made for SM80): auto: supports head widths of 192/128"
    )
    assert "not cudnn: it needs cuDNN 9.15.1 or later and torch has 9.10.2" in text
    assert "not flash3: flash_attn_interface is not installed" in text


@pytest.mark.parametrize(
    ("name", "case", "gpu", "why"),
    [
        ("cudnn", V3, replace(HOPPER, cudnn_version=None), "torch has none"),
        ("cudnn", V3, replace(HOPPER, cudnn_version=91500), "later and torch has 9.15.0"),
        ("cudnn", V3, replace(HOPPER, compute_capability=(12, 0)), "9.0 or 10.x and the one here has 12.0"),
        ("cudnn", replace(V3, dtype=torch.float32), HOPPER, "BF16 and FP16, the run in float32"),
        ("cudnn", replace(V3, qk_head_dim=160), HOPPER, "192/128 or at most 128; the model's are 160/128"),
        ("cudnn", replace(V3, sequence_length=1), HOPPER, "at least two tokens"),
        ("flash3", V3, HOPPER, "is not installed"),
        ("flash3", V3, GpuCapabilities((10, 0), 92000, None), "compute capability 9.0"),
        ("flash3", replace(V3, v_head_dim=64), replace(HOPPER, flash3_unavailable_reason=None), "equal ones up to 256"),
        ("efficient", replace(V3, dtype=torch.float64), HOPPER, "set training.attention_backend=math"),
        ("efficient", replace(V3, v_head_dim=12), HOPPER, "multiples of 8"),
        ("math", V3, HOPPER, "take 8.6 GB, more than 1 GB; set training.attention_backend=auto"),
        ("auto", replace(V3, dtype=torch.float64), HOPPER, "no backend supports this run. cudnn: it computes in BF16"),
    ],
)
def test_what_does_not_serve_is_refused_with_the_reason(
    name: str, case: AttentionShape, gpu: GpuCapabilities, why: str
) -> None:
    assert why in refused(select_attention, name, case, gpu)["training.attention_backend"]


def test_math_is_refused_from_a_gigabyte_of_scores_on() -> None:
    fits = replace(V3, heads=125, sequence_length=1000, batch=2)  # 4 bytes x 2 x 125 x 1000²: the limit itself
    assert not list(unsupported_shape_reasons("math", fits))
    assert list(unsupported_shape_reasons("math", replace(fits, sequence_length=1001)))
    assert list(unsupported_shape_reasons("math", replace(fits, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["training.attention_backend=fused"], "must be auto, cudnn, flash3, efficient or math"),
        (
            ["training.attention_backend=cudnn", "training.device=cpu"],
            "is a GPU backend: set it to auto, or set training.device=cuda",
        ),
        (["training.attention_backend=cudnn", "precision=fp32"], "BF16 and FP16, the run in float32"),
        (
            ["training.attention_backend=math", "training.sequence_length=65536"],
            "set training.attention_backend=auto",
        ),
    ],
)
def test_a_configuration_that_no_gpu_can_run_is_refused(overrides: list[str], why: str) -> None:
    assert why in refused(compose_run_config, overrides)["training.attention_backend"]


def test_deepseek_v3_may_not_use_math() -> None:
    config = compose_run_config(["experiment=deepseek_v3_h800"])
    wrong = replace(config, training=replace(config.training, attention_backend="math"))
    assert "(1 x 128 heads x 4096²) take 8.6 GB" in by_field(wrong.problems())["training.attention_backend"]


def test_a_named_backend_asks_no_device() -> None:
    """A run can be rehearsed without a GPU; only `auto` looks at the device."""
    config = compose_run_config(["training.attention_backend=cudnn"])
    backend, case = config.training.attention_backend, config.attention_shape(torch.bfloat16)
    assert choose_attention(backend, case, torch.device("cuda", 0)).name == "cudnn"
    assert choose_attention("auto", case, torch.device("cpu")) is CPU_ATTENTION


def test_the_choice_reaches_every_layer() -> None:
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls.append(q.shape)
        return causal_attention(q, k, v, scale)

    with torch.device("meta"):
        model = Model(compose_run_config([]).model)
    choice = AttentionBackend("ours", attend, "a test", "of course")
    model.set_attention(choice)
    layers = [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention)]
    assert len(layers) == model.config.num_hidden_layers + model.config.num_nextn_predict_layers
    assert all(layer.core_attention is attend for layer in layers)
    assert model.attention is choice


def test_no_device_but_a_cpu_computes_without_a_choice() -> None:
    inputs = [torch.empty(1, 2, 4, 8, device="meta") for _ in range(3)]
    with pytest.raises(RuntimeError, match="no attention backend is set for meta"):
        causal_attention(inputs[0], inputs[1], inputs[2], 1.0)


# ---- each operator, called as on a GPU, on tensors without memory


def on_fake_gpu(mode: FakeTensorMode, width: int, case: AttentionShape = V3, columns: slice = slice(None)) -> Tensor:
    """Return [B, H, S, width], a view of [B, S, H, any] as projections give it; `columns` cuts it from wider heads."""
    meta = torch.empty(case.batch, case.sequence_length, case.heads, width, dtype=case.dtype, device="meta")
    return FakeTensor(mode, meta[..., columns].transpose(1, 2), torch.device("cuda", 0))


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_an_operator_runs_on_fake_tensors_of_a_gpu(name: str) -> None:
    """V3's values are the second half of a 256-column projection per head: strided, and narrower than the keys."""
    mode = FakeTensorMode()
    q, k, v = (on_fake_gpu(mode, 192), on_fake_gpu(mode, 192), on_fake_gpu(mode, 256, columns=slice(128, None)))
    with mode:
        out = GPU_BACKENDS[name].core_attention(q, k, v, 0.1)
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype, out.device) == ((1, 128, 4096, 128), torch.bfloat16, torch.device("cuda", 0))
    assert out.transpose(1, 2).is_contiguous()  # so that the Linear behind it copies nothing


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_an_operator_has_a_gradient(name: str) -> None:
    """The meta kernels of the backward return one gradient per input, as the autograd formula needs."""
    case = replace(V3, heads=2, sequence_length=256)
    shapes = ((case.batch, case.heads, case.sequence_length, width) for width in (192, 192, 128))
    q, k, v = (torch.empty(shape, dtype=case.dtype, device="meta", requires_grad=True) for shape in shapes)
    out = GPU_BACKENDS[name].core_attention(q, k, v, 0.1)
    assert type(out.grad_fn).__name__.lower().startswith(f"scaleddotproduct{name}attention")
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]


def test_cudnn_answers_for_one_token_itself() -> None:
    q, k, v = (torch.randn(2, 3, 1, width) for width in (24, 24, 16))
    torch.testing.assert_close(
        GPU_BACKENDS["cudnn"].core_attention(q, k, v, 0.3), causal_attention_reference(q, k, v, 0.3)
    )


def test_math_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 3, 40, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for width in (24, 24, 16)
    ]
    q, k, v = inputs
    pairs = [
        torch.autograd.grad(f(q, k, v, 0.3).sin().sum(), inputs)
        for f in (GPU_BACKENDS["math"].core_attention, causal_attention)
    ]
    for ours, blocks in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, blocks, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("with_sums", [False, True], ids=["output alone", "log-sum-exps, too"])
def test_flash_attention_3_is_called_in_its_own_layout(with_sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool) -> Any:
        given.update(shape=q.shape, causal=causal)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = causal_attention_reference(next(heads), next(heads), next(heads), softmax_scale).transpose(1, 2)
        return (out, torch.zeros(1)) if with_sums else out

    module = ModuleType("flash_attn_interface")
    module.__dict__["flash_attn_func"] = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    q, k, v = (torch.randn(2, 3, 7, width) for width in (24, 24, 16))
    torch.testing.assert_close(GPU_BACKENDS["flash3"].core_attention(q, k, v, 0.3), causal_attention(q, k, v, 0.3))
    assert given == {"shape": (2, 7, 3, 24), "causal": True}


# ---- the trial at start-up

SMALL = AttentionShape(batch=1, heads=2, sequence_length=16, qk_head_dim=24, v_head_dim=16, dtype=torch.float32)


@pytest.mark.parametrize("choice", [attention_by_name("math"), CPU_ATTENTION], ids=["math", "blocks"])
def test_a_trial_passes_where_the_backend_serves(choice: AttentionBackend) -> None:
    calls: list[tuple[list[torch.Size], float]] = []
    gradients: list[torch.Size] = []

    def watched(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
        calls.append(([x.shape for x in (q_BHSW, k_BHSW, v_BHSV)], scale))
        out = choice.core_attention(q_BHSW, k_BHSW, v_BHSV, scale)
        out.register_hook(lambda grad: gradients.append(grad.shape))
        return out

    backend = AttentionBackend(choice.name, watched, "a test")
    problems: list[Problem] = []
    with collect_problems(problems):
        probe_attention(backend, SMALL, torch.device("cpu"))
    assert problems == []
    assert calls == [([(1, 2, 16, 24), (1, 2, 16, 24), (1, 2, 16, 16)], 24**-0.5)]
    assert gradients == [(1, 2, 16, 16)]


def test_a_trial_that_fails_refuses_the_run_and_takes_nothing_else() -> None:
    """An operator for GPUs, called on a CPU, stands for a library that refuses the shape."""
    found = refused(probe_attention, attention_by_name("cudnn"), SMALL, torch.device("cpu"))[
        "training.attention_backend"
    ]
    assert "'cudnn': it fails at this run's shape: " in found
    assert "set training.attention_backend=flash3 or training.attention_backend=efficient" in found


def test_a_trial_looks_at_the_numbers() -> None:
    broken = AttentionBackend("broken", lambda q, k, v, scale: causal_attention(q, k, v, scale) / 0.0, "a test")
    found = refused(probe_attention, broken, SMALL, torch.device("cpu"))
    assert "not finite" in found["training.attention_backend"]


def test_what_is_missing_is_no_secret_of_one_gpu() -> None:
    assert not list(unsupported_gpu_reasons("math", V3, GpuCapabilities((7, 0), None, "no")))
    assert "8.0 or later" in "".join(unsupported_gpu_reasons("efficient", V3, GpuCapabilities((7, 0), None, "no")))
