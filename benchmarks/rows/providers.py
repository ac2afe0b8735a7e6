"""Rows for optional packages: one operation of each, compared with plain PyTorch.

None is imported before its row, and none is required.
Letters: M, N, K sides of a matrix product; T tokens, D hidden, K top-k in routing.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from shoestring.benchmarks.rows.compute import scaled_operands
from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, expect, relative_error


def transformer_engine(machine: Machine) -> Figures:
    """Test a Linear with block scaling, as in the report; two roundings to E4M3 cause about 4 % of noise."""
    _need("transformer_engine")
    machine.need_gpu((9, 0))
    te = importlib.import_module("transformer_engine.pytorch")
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
    linear = te.Linear(1024, 1024, bias=False, params_dtype=torch.bfloat16, device=machine.device)
    x = torch.randn(512, 1024, device=machine.device, dtype=torch.bfloat16, requires_grad=True)
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
        out = linear(x)
    out.square().mean().backward()
    error = expect("the output", relative_error(out, x.detach() @ linear.weight.detach().t()), 0.08)
    return {"version": importlib.metadata.version("transformer_engine"), "error": error}


def apex_adam(machine: Machine) -> Figures:
    _need_nvidias_apex()
    machine.need_gpu()
    start = torch.randn(1000, device=machine.device)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    fused = importlib.import_module("apex.optimizers").FusedAdam([theirs], lr=1e-2, weight_decay=0.1, adam_w_mode=True)
    plain = torch.optim.AdamW([ours], lr=1e-2, weight_decay=0.1)
    for parameter, optimizer in ((ours, plain), (theirs, fused)):
        parameter.square().sum().backward()
        optimizer.step()
    return {"error": expect("the step", relative_error(theirs.detach(), ours.detach()), 1e-5)}


def apex_weight_gradient(machine: Machine) -> Figures:
    """Test the weight-gradient GEMM that accumulates in an FP32 buffer."""
    _need_nvidias_apex()
    _need("fused_weight_gradient_mlp_cuda")
    machine.need_gpu()
    x_MK, grad_MN = (torch.randn(512, 256, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    buffer_NK = torch.ones(256, 256, device=machine.device)
    importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32(x_MK, grad_MN, buffer_NK)
    truth_NK = 1 + grad_MN.float().t() @ x_MK.float()
    return {"error": expect("the gradient", relative_error(buffer_NK, truth_NK), 1e-4)}


def deep_gemm(machine: Machine) -> Figures:
    _need("deep_gemm")
    machine.need_gpu((9, 0))
    a8, scale_a, b8, scale_b, truth_MN = scaled_operands(machine)
    out_MN = torch.empty_like(truth_MN, dtype=torch.bfloat16)
    library = importlib.import_module("deep_gemm")

    def multiply() -> None:
        library.fp8_gemm_nt((a8, scale_a), (b8, scale_b), out_MN)

    multiply()
    error = expect("the product", relative_error(out_MN, truth_MN), 1e-2)
    seconds = machine.seconds(multiply)
    return {"TFLOP/s": 2 * a8.shape[0] * b8.numel() / seconds / 1e12, "error": error}


def deep_ep(machine: Machine) -> Figures:
    """Test dispatch and combine: each token comes back once per rank to which it was sent."""
    _need("deep_ep")
    machine.need_gpu((9, 0))
    ranks = machine.world.size
    if ranks == 1:
        raise NotHere("one process")
    tokens, hidden, top_k, experts = 1024, 7168, 8, 8 * ranks
    x_TD = torch.randn(tokens, hidden, device=machine.device, dtype=torch.bfloat16)
    experts_TK = torch.rand(tokens, experts, device=machine.device).topk(top_k).indices
    weights_TK = torch.full((tokens, top_k), 1 / top_k, device=machine.device)
    buffer = importlib.import_module("deep_ep").ElasticBuffer(
        machine.world.process_group, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=top_k
    )
    received, _, _, handle, _ = buffer.dispatch(
        x_TD, topk_idx=experts_TK, topk_weights=weights_TK, num_experts=experts, num_max_tokens_per_rank=tokens
    )
    combined_TD, _, _ = buffer.combine(received, handle=handle)
    reached = torch.zeros(tokens, ranks, device=machine.device).scatter_(1, experts_TK // 8, 1.0)
    truth_TD = x_TD.float() * reached.sum(dim=1, keepdim=True)
    return {"error": expect("the tokens", relative_error(combined_TD, truth_TD), 1e-2)}


def _need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise NotHere(f"{name} is not installed")


def _need_nvidias_apex() -> None:
    """Raise `NotHere` without NVIDIA's apex. PyPI's apex is unrelated, so its folder is checked before any import."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise NotHere("apex is not installed")
    if not any((Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or ()):
        raise NotHere("the installed apex is not NVIDIA's: it has no apex.optimizers")


CHECKS = (
    Check("transformer_engine block scaling", transformer_engine, mandatory=False),
    Check("apex FusedAdam", apex_adam, mandatory=False),
    Check("apex weight gradient in fp32", apex_weight_gradient, mandatory=False),
    Check("deep_gemm fp8", deep_gemm, mandatory=False),
    Check("deep_ep dispatch and combine", deep_ep, mandatory=False),
)
