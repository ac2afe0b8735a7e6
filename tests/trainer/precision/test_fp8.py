"""A Linear in FP8: its three products by the NumPy definition, the tensors it keeps, and when weights are quantized."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from shoestring.comm.fp8 import tiles_per_row
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.reference import fp8_model
from shoestring.tests.trainer.precision.fp8_linear import INNER, WIDTH, linear, normal
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.experts import GroupedExperts, SwiGLUFeedForward
from shoestring.trainer.model.linear import Linear
from shoestring.trainer.model.model import Model
from shoestring.trainer.precision.backend import RowsPerExpert
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.fp8_tensors import ColumnwiseFp8Tensor, RowwiseFp8Tensor, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend

ROWS = (100, 0, 50)


def run(function: Callable[[Tensor], Tensor], x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Return the output, the gradient of x, and the gradients of the weights."""
    x = x.detach().requires_grad_()
    for weight in weights:
        weight.grad = None
    out = function(x)
    out.backward(normal(*out.shape, dtype=out.dtype))
    return [out.detach(), x.grad, *(weight.grad for weight in weights)]  # type: ignore[list-item]


def grad_of(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("after_attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_three_products_are_the_definition(dtype: torch.dtype, after_attention: bool) -> None:
    module, x = linear(after_attention), normal(3, 70, WIDTH).to(dtype)
    ours = run(module, x, module.weight)
    theirs = run(lambda x: fp8_model.linear(x, module.weight, after_attention), x, module.weight)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert ours[2].dtype == torch.float32  # accumulates in the dtype of the parameter, whatever computes
    assert all(torch.equal(mine, other.to(mine.dtype)) for mine, other in zip(ours[:2], theirs[:2], strict=True))
    if dtype == torch.float32:  # the reference rounds it to the dtype of x
        assert torch.equal(ours[2], theirs[2])


def test_swiglu_is_the_definition_from_its_kept_input() -> None:
    module = SwiGLUFeedForward(WIDTH, INNER).double()
    with torch.no_grad():
        for number, weight in enumerate(module.parameters()):
            weight.copy_(normal(*weight.shape, dtype=torch.float64) / (10 + number))
    for part in (module.gate_up, module.down):
        part.fp8 = Fp8LinearOps(ReferenceBackend())
    gate, up = module.gate_up.weight.detach().chunk(2)
    down = module.down.weight.detach()
    names = [f"x.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    params = {name: weight.clone().requires_grad_() for name, weight in zip(names, (gate, up, down), strict=True)}
    x = normal(130, WIDTH, dtype=torch.float64)
    ours = run(module, x, *module.parameters())
    out, grad_x, *grads = run(lambda x: fp8_model.swiglu(params, "x", x), x, *params.values())
    for mine, other in zip(ours, (out, grad_x, torch.cat(grads[:2]), grads[2]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def experts() -> GroupedExperts:
    module = GroupedExperts(len(ROWS), WIDTH, INNER).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(normal(*weight.shape, dtype=torch.float64) / 10)
    module.fp8 = Fp8LinearOps(ReferenceBackend())
    return module


def test_experts_are_the_definition_one_at_a_time() -> None:
    module = experts()
    gates = torch.rand(sum(ROWS), dtype=torch.float64, requires_grad=True)
    x = normal(sum(ROWS), WIDTH, dtype=torch.float64)
    out, grad_x, grad_up, grad_down, grad_gates = run(
        lambda x: module(x, gates, ROWS), x, module.gate_up_LFD, module.down_LDF, gates
    )
    upstream = normal(*out.shape, dtype=out.dtype)
    start = 0
    for number, count in enumerate(ROWS):
        mine = slice(start, start + count)
        start += count
        if not count:
            assert not grad_up[number].any()
            assert not grad_down[number].any()
            continue
        gate, up = module.gate_up_LFD[number].detach().chunk(2)
        leaves = {
            "e.gate_proj.weight": gate.clone().requires_grad_(),
            "e.up_proj.weight": up.clone().requires_grad_(),
            "e.down_proj.weight": module.down_LDF[number].detach().clone().requires_grad_(),
        }
        rows = x[mine].clone().requires_grad_()
        weights = gates[mine].detach().clone().requires_grad_()
        expected = fp8_model.swiglu(leaves, "e", rows, weights)
        expected.backward(upstream[mine])
        pairs = [(out[mine], expected), (grad_x[mine], rows.grad), (grad_gates[mine], weights.grad)]
        pairs.append((grad_up[number], torch.cat([grad_of(leaf) for leaf in leaves.values()][:2])))
        pairs.append((grad_down[number], leaves["e.down_proj.weight"].grad))
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_of_weights_can_wait() -> None:
    module, mixture = linear(), experts()
    gates, x = torch.rand(150, dtype=torch.float64), normal(150, WIDTH)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor, list[nn.Parameter]]] = [
        (module, x, [module.weight]),
        (lambda rows: mixture(rows, gates, ROWS), x.double(), list(mixture.parameters())),
    ]
    for function, source, weights in cases:
        undelayed = run(function, source, *weights)
        left = DelayedWeightGradients(deferred=True)
        with left.collect_from_forward():
            later = run(function, source, *weights)
        assert later[2:] == [None] * len(weights)
        left.flush()
        found = [*later[:2], *map(grad_of, weights)]
        assert all(torch.equal(one, other) for one, other in zip(undelayed, found, strict=True))
        with left.collect_from_forward():
            again = function(source)
        again.backward(normal(*later[0].shape, dtype=source.dtype))
        left.flush()
        assert all(torch.equal(grad_of(weight), 2 * once) for weight, once in zip(weights, undelayed[2:], strict=True))


@dataclass(frozen=True)
class Adding(ReferenceBackend):
    """A backend that records the gradients it adds to."""

    sums: list[tuple[torch.Size, int]] = field(default_factory=list)

    def accumulate_grouped_wgrad(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor, sum_LNK: Tensor) -> None:
        self.sums.append((sum_LNK.shape, sum_LNK.data_ptr()))
        super().accumulate_grouped_wgrad(grad, x, sum_LNK)


def test_a_backend_adds_to_the_gradient_that_is_there() -> None:
    adding, module, mixture = Adding(), linear(), experts()
    module.fp8 = mixture.fp8 = Fp8LinearOps(adding)
    gates, left = torch.rand(150, dtype=torch.float64), DelayedWeightGradients()
    for _ in range(2):
        with left.collect_from_forward():
            outputs = module(normal(150, WIDTH)), mixture(normal(150, WIDTH).double(), gates, ROWS)
        for out in outputs:
            out.sum().backward()
            left.flush()
    weights = [module.weight[None], mixture.down_LDF, mixture.gate_up_LFD]
    assert [shape for shape, _ in adding.sums] == [weight.shape for weight in weights]
    grads = [grad_of(module.weight), grad_of(mixture.down_LDF), grad_of(mixture.gate_up_LFD)]
    assert [place for _, place in adding.sums] == [grad.data_ptr() for grad in grads]


@dataclass(frozen=True)
class Fused(ReferenceBackend):
    """A backend that records the SwiGLUs it quantizes, and transposes."""

    seen: list[str] = field(default_factory=list)

    def swiglu_quantize_rowwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, scales: ScaleFormat
    ) -> RowwiseFp8Tensor:
        self.seen.append("rows" if gates_R is None else "weighted rows")
        return super().swiglu_quantize_rowwise(gate_up_RF, gates_R, scales)

    def swiglu_quantize_columnwise(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        self.seen.append("columns" if gates_R is None else "weighted columns")
        return super().swiglu_quantize_columnwise(gate_up_RF, gates_R, rows_L, scales)

    def rowwise_to_columnwise(
        self, x: RowwiseFp8Tensor, rows_L: RowsPerExpert, scales: ScaleFormat
    ) -> ColumnwiseFp8Tensor:
        self.seen.append("transposed")
        return super().rowwise_to_columnwise(x, rows_L, scales)


def test_a_backend_is_given_the_input_of_a_swiglu_and_tiles_to_transpose() -> None:
    fused, network, mixture = Fused(), SwiGLUFeedForward(WIDTH, INNER), experts().float()
    network.down.fp8 = mixture.fp8 = Fp8LinearOps(fused)
    x, gates = normal(sum(ROWS), WIDTH), torch.rand(sum(ROWS))
    run(network, x, *network.parameters())
    run(lambda rows: mixture(rows, gates, ROWS), x, *mixture.parameters())
    with torch.no_grad():
        network(x)
    assert fused.seen == ["rows", "columns", "weighted rows", "transposed", "weighted columns", "transposed", "rows"]


def kept_bytes(function: Callable[[], Tensor], weights: list[nn.Parameter]) -> int:
    """Return the bytes kept for the backward, without weights in any form."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not any(tensor.shape in (weight.shape, weight.mT.shape) for weight in weights):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_what_is_kept_for_the_backward_is_as_large_as_it_says() -> None:
    rows, blocks = 512, tiles_per_row(150) * tiles_per_row(WIDTH) * 4
    x = normal(rows, WIDTH).bfloat16().requires_grad_()
    scales = rows * tiles_per_row(WIDTH)
    for after_attention, expected in ((False, rows * WIDTH + 4 * scales), (True, rows * WIDTH * 3 // 2 + scales)):
        module = linear(after_attention)
        assert kept_bytes(partial(module, x), [module.weight]) == expected + blocks
        module.fp8 = None
        assert kept_bytes(partial(module, x), [module.weight]) == rows * WIDTH * 2


def test_experts_keep_two_tiled_tensors_instead_of_three_whole_ones() -> None:
    module, rows = experts().float(), sum(ROWS)
    x, gates = normal(rows, WIDTH).bfloat16().requires_grad_(), torch.rand(rows)
    function, weights = partial(module, x, gates, ROWS), list(module.parameters())
    scales = rows * (tiles_per_row(WIDTH) + tiles_per_row(2 * INNER))
    blocks = len(ROWS) * tiles_per_row(WIDTH) * (tiles_per_row(2 * INNER) + tiles_per_row(INNER))
    expected = rows * (WIDTH + 2 * INNER) + 4 * (scales + blocks + rows)  # the last: gates
    assert kept_bytes(function, weights) == expected
    module.fp8 = None
    in_fp8 = expected
    with DelayedWeightGradients().collect_from_forward():  # as in training; outside of it cast weights are kept too
        native = kept_bytes(function, weights)
    assert native == 2 * rows * (WIDTH + 2 * INNER + INNER) + 4 * rows
    assert in_fp8 < 0.45 * native


def test_the_head_and_the_router_have_no_fp8() -> None:
    model = Model(ModelConfig())
    model.enable_fp8(Fp8LinearOps(ReferenceBackend()))
    plain = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.fp8 is None}
    assert plain == {"head"}
    in_fp8 = [
        name for name, module in model.named_modules() if isinstance(module, Linear | GroupedExperts) and module.fp8
    ]
    assert {name.rsplit(".", 1)[-1] for name in in_fp8} == {
        "q_down", "q_up", "kv_down", "kv_up", "out", "gate_up", "down", "experts", "project",
    }  # fmt: skip
    assert {name for name, module in model.named_modules() if getattr(module, "after_attention", False)} == {
        name for name in in_fp8 if name.endswith(".out")
    }


def test_without_gradients_the_numbers_are_the_same() -> None:
    mixture, gates = experts(), torch.rand(sum(ROWS), dtype=torch.float64)
    network = SwiGLUFeedForward(WIDTH, INNER).double()
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(normal(*weight.shape, dtype=torch.float64) / 10)
    for part in (network.gate_up, network.down):
        part.fp8 = Fp8LinearOps(ReferenceBackend())
    cases: list[tuple[Callable[[Tensor], Tensor], torch.dtype]] = [
        (linear(), torch.float32),
        (linear(after_attention=True), torch.bfloat16),
        (network, torch.float64),
        (lambda rows: mixture(rows, gates, ROWS), torch.float64),
    ]
    for function, dtype in cases:
        x = normal(sum(ROWS), WIDTH).to(dtype)
        kept = function(x)
        assert kept.requires_grad
        with torch.no_grad():
            assert torch.equal(function(x), kept)


def test_no_rows_are_rows_too() -> None:
    network = SwiGLUFeedForward(WIDTH, INNER)
    for part in (network.gate_up, network.down):
        part.fp8 = Fp8LinearOps(ReferenceBackend())
    for module, out in ((linear(), 150), (linear(after_attention=True), 150), (network, WIDTH)):
        found, grad, *weights = run(module, normal(0, 3, WIDTH), *module.parameters())
        assert found.shape == (0, 3, out)
        assert grad.shape == (0, 3, WIDTH)
        assert not any(weight.any() for weight in weights)
        with torch.no_grad():
            assert module(normal(2, 0, WIDTH)).shape == (2, 0, out)


def test_a_frozen_weight_gets_no_gradient() -> None:
    module = linear()
    module.weight.requires_grad_(False)
    x = normal(3, WIDTH).requires_grad_()
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None
