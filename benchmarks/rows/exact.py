"""Rows whose result on a GPU must equal a CPU's to the last bit, or nearly: routing, casts to FP8, 12-bit formats.

Letters: T tokens, E experts, K top-k, M members, C copies, D width.
"""

import torch
from torch import Tensor

from shoestring.benchmarks.rows.row import Check, Figures, Machine, Wrong, expect, relative_error
from shoestring.comm.exchange.permutation import Permutation, build_destination_mask
from shoestring.comm.fp8 import dequantize, quantize
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.router import Router
from shoestring.trainer.precision.e5m6 import pack_e5m6, unpack_e5m6

TOKENS, EXPERTS, TOP_K, MEMBERS, WIDTH = 512, 64, 8, 8, 256


def token_layout(machine: Machine) -> Figures:
    """Test the permutation of a dispatch (`nonzero_static`, stable `argsort`), and the sums of a combine."""
    generator = torch.Generator().manual_seed(0)
    members_TK = torch.randint(-1, MEMBERS, (TOKENS, TOP_K), generator=generator)
    rows_TD = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16()
    copies = int(build_destination_mask(members_TK, MEMBERS).sum())

    def on(device: torch.device) -> tuple[Permutation, Tensor, Tensor]:
        permutation = Permutation.from_destination_mask(build_destination_mask(members_TK.to(device), MEMBERS), copies)
        spread_CD = permutation.permute(rows_TD.to(device))
        return permutation, spread_CD, permutation.unpermute_and_sum(spread_CD)

    (permutation, spread_CD, sums_TD), (reference, reference_CD, reference_TD) = (
        on(machine.device),
        on(torch.device("cpu")),
    )
    for name, theirs in vars(reference).items():
        _same(name, vars(permutation)[name], theirs)
    _same("rows sent", spread_CD, reference_CD)
    _same("sums of copies, made twice", on(machine.device)[2], sums_TD.cpu())
    error = expect("the sums of copies", relative_error(sums_TD.cpu(), reference_TD), 1e-6)
    return {"copies": float(copies), "error_of_sums": error}


def router(machine: Machine) -> Figures:
    """Test expert ids and loads. Inputs are small integers, so that logits do not depend on the order of addition."""
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig(hidden_size=64, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=8, topk_group=4)
    x_BSD = torch.randint(-3, 4, (4, 128, 64), generator=generator).float() / 8
    weight_ED = torch.randint(-5, 6, (EXPERTS, 64), generator=generator).float() / 16
    bias_E = torch.randn(EXPERTS, generator=generator) / 100

    def on(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        with torch.device(device):
            ours = Router(config)
        with torch.no_grad():
            ours.weight.copy_(weight_ED)
            ours.bias_E.copy_(bias_E)
            routing = ours(x_BSD.to(device), torch.ones(4, 128, dtype=torch.bool, device=device))
        return routing.expert_ids_TK, routing.tokens_per_expert_E, routing.gates_TK

    (experts_TK, counts_E, gates_TK), (reference_TK, reference_E, reference_gates_TK) = (
        on(machine.device),
        on(torch.device("cpu")),
    )
    _same("experts", experts_TK.sort().values, reference_TK.sort().values)
    _same("loads", counts_E, reference_E)
    order, reference_order = experts_TK.argsort(dim=1).cpu(), reference_TK.argsort(dim=1)
    error = relative_error(gates_TK.cpu().gather(1, order), reference_gates_TK.gather(1, reference_order))
    return {"experts": float(EXPERTS), "error_of_gates": expect("the gates", error, 1e-6)}


def e4m3_cast(machine: Machine) -> Figures:
    """Test all BF16 numbers, and FP32 numbers around 448, 464 (which overflows) and the subnormal range."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    borders = torch.tensor([448.0, 464.0, 480.0, 2.0**-6, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9])
    near = torch.cat([torch.nextafter(borders, borders * factor) for factor in (0.0, 2.0)])
    values = torch.cat((every, borders, -borders, near, -near))
    reference = values.to(torch.float8_e4m3fn).float()
    ours = values.to(machine.device).to(torch.float8_e4m3fn).float()
    _same("casts of FP32", ours, reference)
    halves = every.bfloat16()
    _same("casts of BF16", halves.to(machine.device).to(torch.float8_e4m3fn).float(), halves.to(torch.float8_e4m3fn))
    return {"numbers": float(len(values) + len(halves)), "largest": float(reference.nan_to_num(0).max())}


def tiles_on_the_wire(machine: Machine) -> Figures:
    """Test the FP8 wire format: bytes and exponents, with NaN and infinity, and decoding."""
    x_XD = hard_numbers(300, 1024).bfloat16()
    values_XD, exponents_XQ = quantize(x_XD.to(machine.device))
    reference_XD, reference_XQ = quantize(x_XD)
    _same("exponents", exponents_XQ, reference_XQ)
    _same("values", values_XD.float(), reference_XD.float())
    _same(
        "rows that came",
        *(dequantize(*each, torch.bfloat16) for each in ((values_XD, exponents_XQ), (reference_XD, reference_XQ))),
    )
    return {"rows": float(len(x_XD))}


def e5m6(machine: Machine) -> Figures:
    """Test bytes of packed 12-bit rows, with subnormal numbers, NaN and infinity, and unpacking."""
    x_XD = hard_numbers(300, 1025)
    ours, reference = pack_e5m6(x_XD.to(machine.device)), pack_e5m6(x_XD)
    _same("exponents", ours.exponents_XQ, reference.exponents_XQ)
    _same("numbers", unpack_e5m6(ours, torch.float32), unpack_e5m6(reference, torch.float32))
    whole_X = x_XD.isfinite().all(dim=1)  # NaN has several encodings
    _same("bytes", ours.bytes_XB.cpu()[whole_X], reference.bytes_XB[whole_X])
    return {"rows": float(len(x_XD)), "bytes": float(reference.bytes_XB.numel())}


def hard_numbers(rows: int, width: int) -> Tensor:
    """Return FP32 [rows, width]: 2^-40 to 2^20 within a tile, a tile of zeros, three with infinity or NaN."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-40, 21, (rows, width), generator=generator)
    x = torch.randn(rows, width, generator=generator) * torch.exp2(exponents.float())
    x[0, :128] = 0
    x[1, 3], x[2, 4], x[rows - 1, 0] = float("nan"), float("inf"), -float("inf")
    return x


def _same(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise `Wrong` unless `ours` equals `theirs`, the right values; NaN equals NaN."""
    ours, theirs = (x.cpu() if not x.is_floating_point() else x.cpu().float() for x in (ours, theirs))
    other = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    if bool(other.any()):
        place = tuple(other.nonzero()[0].tolist())
        count = f"{int(other.sum())} of {other.numel()} {what}"
        raise Wrong(f"{count} differ, first at {place}: {ours[place].item()}, not {theirs[place].item()}")


CHECKS = (
    Check("token layout, as on a CPU", token_layout, mandatory=True),
    Check("router, as on a CPU", router, mandatory=True),
    Check("cast to E4M3, as on a CPU", e4m3_cast, mandatory=True),
    Check("FP8 rows on the wire, as on a CPU", tiles_on_the_wire, mandatory=True),
    Check("E5M6, as on a CPU", e5m6, mandatory=True),
)
