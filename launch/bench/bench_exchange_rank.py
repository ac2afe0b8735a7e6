"""One rank of `shoestring bench exchange`: times and bytes of the four operations of several dispatchers and formats.

Letters: T tokens, D hidden, E experts, K top-k, N nodes, P ranks.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...comm.async_comm import build_async_communicator
from ...comm.errors import Problem
from ...comm.exchange.api import TokenExchange
from ...comm.exchange.config import EXCHANGE_NAMES, ExchangeConfig
from ...comm.exchange.deepep import missing_deepep_requirements
from ...comm.exchange.deepep_buffer import DeepEPBufferShape
from ...comm.exchange.factory import build_token_exchange
from ...comm.exchange.permutation import build_destination_mask
from ...comm.exchange.wire_format import RowCodec, WireFormat
from ...comm.groups import ProcessGroups
from ...comm.topology import LinkType, Topology
from ...comm.trace import ExchangeLabel
from ...comm.traffic import TrafficCounter, TrafficKind
from ..run.on_ranks import RankContext
from ..run.rank_environment import build_rank_environment

T = TypeVar("T")

OPERATIONS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
FORMATS = (WireFormat.BF16, WireFormat.FP8)

_LABEL = ExchangeLabel("bench", 0)
_IN_FLIGHT = 4  # dispatches in one measurement of overlap


@dataclass(frozen=True, kw_only=True)
class ExchangeBenchmarkSpec:
    """Sizes and options of a benchmark. Tokens are BF16 and go to random experts within random groups."""

    nodes: int
    gpus_per_node: int
    hidden: int
    tokens: int
    """Tokens per rank."""
    experts: int
    top_k: int
    groups: int
    """Number of groups of consecutive experts."""
    top_k_groups: int
    """Number of groups to which the experts of one token are limited."""
    exchanges: tuple[str, ...]
    formats: tuple[str, ...]
    """`bf16`, or `fp8`: FP8 to the experts and BF16 back."""
    repeats: int
    overlap: bool
    """True to measure the overlap of dispatches with computation as well."""

    @property
    def topology(self) -> Topology:
        """Topology with every rank in one expert-parallel group."""
        return Topology(ep=self.nodes * self.gpus_per_node, gpus_per_node=self.gpus_per_node)

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid size or name."""
        counts = {name: value for name, value in vars(self).items() if type(value) is int}
        yield from (Problem(name, value, "must be at least 1") for name, value in counts.items() if value < 1)
        if min(counts.values()) < 1:
            return
        for name, divisor in (("ranks", self.topology.ep), ("groups", self.groups)):
            if self.experts % divisor:
                yield Problem("experts", self.experts, f"must be a multiple of the {divisor} {name}")
        if self.top_k_groups > self.groups:
            yield Problem("top_k_groups", self.top_k_groups, f"must be at most groups = {self.groups}")
        reachable = self.experts // self.groups * self.top_k_groups
        if self.top_k > reachable:
            yield Problem(
                "top_k", self.top_k, f"must be at most {reachable}, the experts in {self.top_k_groups} groups"
            )
        if "deepep" in self.exchanges:
            for reason in missing_deepep_requirements("auto", self.gpus_per_node, build_rank_environment()):
                yield Problem("exchanges", "deepep", reason)
        for field, known in (("exchanges", EXCHANGE_NAMES), ("formats", FORMATS)):
            for name in vars(self)[field]:
                if name not in known:
                    yield Problem(field, name, f"must be one of: {', '.join(known)}")


@dataclass(frozen=True)
class DispatchInputs:
    """Inputs of one rank: tokens, gate weights, expert ids, and the gradient of the combined output."""

    tokens_TD: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    grad_TD: Tensor


def make_dispatch_inputs(spec: ExchangeBenchmarkSpec, rank: int, device: torch.device) -> DispatchInputs:
    """Return random inputs that depend only on `spec` and `rank`."""
    generator = torch.Generator().manual_seed(rank)
    group_score_TG = torch.rand(spec.tokens, spec.groups, generator=generator)
    closed_TG = torch.ones_like(group_score_TG).scatter_(1, group_score_TG.topk(spec.top_k_groups).indices, 0.0)
    score_TE = torch.rand(spec.tokens, spec.experts, generator=generator)
    score_TE -= 2 * closed_TG.repeat_interleave(spec.experts // spec.groups, dim=1)
    tokens_TD, grad_TD = torch.randn(2, spec.tokens, spec.hidden, generator=generator).bfloat16().to(device)
    weights_TK = torch.rand(spec.tokens, spec.top_k, generator=generator).to(device)
    return DispatchInputs(tokens_TD, weights_TK, score_TE.topk(spec.top_k).indices.to(device), grad_TD)


class Timer(Protocol):
    """Calls a function; returns its result and the seconds that it took."""

    def __call__(self, function: Callable[[], T], /) -> tuple[T, float]:
        """Call `function`, at the same time on all ranks."""
        ...


def time_exchange_operations(
    exchange: TokenExchange[Any], sent: DispatchInputs, label: ExchangeLabel, timed: Timer
) -> tuple[float, float, float, float]:
    """Return the seconds of each of `OPERATIONS` alone, from the call to the arrival of the result."""
    received, first = timed(lambda: exchange.dispatch(sent.tokens_TD, sent.weights_TK, sent.experts_TK, label).wait())
    _, second = timed(lambda: exchange.combine(received.rows_RD, received).wait())
    _, third = timed(lambda: exchange.combine_backward(sent.grad_TD, received).wait())
    _, fourth = timed(lambda: exchange.dispatch_backward(received.rows_RD, received.gate_weights_R, received).wait())
    return first, second, third, fourth


class ExchangeBenchmark:
    """Benchmark of one token dispatcher in one format, on one rank."""

    def __init__(
        self, spec: ExchangeBenchmarkSpec, name: str, form: str, groups: ProcessGroups, device: torch.device
    ) -> None:
        self._groups = groups
        self._sent = make_dispatch_inputs(spec, groups.rank, device)
        self.worker = build_async_communicator(groups.ep, device)
        self._traffic = TrafficCounter(spec.topology, groups.rank)
        config = ExchangeConfig(
            name=name, dispatch=form, combine="bf16", combine_backward=form, dispatch_backward="bf16"
        )
        shape = DeepEPBufferShape(spec.tokens, spec.hidden, spec.top_k)
        self._exchange: TokenExchange[object] = build_token_exchange(
            config, groups, spec.experts, self.worker, self._traffic, shape
        )

    def time_operations(self) -> dict[str, float]:
        """Return the seconds of each operation alone, from its start to its result, on the slowest rank."""
        times = time_exchange_operations(self._exchange, self._sent, _LABEL, self._timed)
        return dict(zip(OPERATIONS, times, strict=True))

    def measure_bytes_sent(self) -> dict[str, dict[str, dict[str, int]]]:
        """Run one pass; return the bytes that all ranks sent, by operation, kind and link."""
        self.time_operations()
        keys = list(product((*OPERATIONS, "sizes"), TrafficKind, LinkType))
        own = [self._traffic.bytes_by_link(kind, operation)[link] for operation, kind, link in keys]
        total = self._groups.world_cpu.all_reduce_sum(torch.tensor(own), "sum of bytes").tolist()
        tree: dict[str, dict[str, dict[str, int]]] = {}
        for (operation, kind, link), size in zip(keys, total, strict=True):
            tree.setdefault(operation, {}).setdefault(kind, {})[link] = size
        return tree

    def measure_overlap(self) -> dict[str, float]:
        """Return the seconds of dispatches, of computation of equal length, and of both overlapped; slowest rank."""
        sent = self._sent
        square = torch.randn(256, 256, device=sent.tokens_TD.device)

        def start() -> Callable[[], object]:
            dispatched = self._exchange.dispatch(sent.tokens_TD, sent.weights_TK, sent.experts_TK, _LABEL)
            dispatched.launch_second_part()  # the whole dispatch is in flight before products are queued
            return dispatched.wait

        def exchanges() -> None:
            for _ in range(_IN_FLIGHT):
                start()()

        def products(count: int) -> None:
            for _ in range(count):
                square @ square

        def both(count: int) -> None:
            for _ in range(_IN_FLIGHT):
                wait = start()
                products(count)
                wait()

        _, alone = self._timed(exchanges)
        _, thousand = self._timed(lambda: products(1000))
        count = max(1, round(1000 * alone / thousand / _IN_FLIGHT))
        _, computing = self._timed(lambda: products(count * _IN_FLIGHT))
        _, together = self._timed(lambda: both(count))
        return {"exchange_seconds": alone, "compute_seconds": computing, "overlapped_seconds": together}

    def total_inter_node_bytes(self) -> int:
        """Return the bytes that all ranks have sent between nodes in all passes."""
        own = torch.tensor(self._traffic.bytes_by_link()[LinkType.INFINIBAND])
        return int(self._groups.world_cpu.all_reduce_sum(own, "sum of bytes"))

    def _timed(self, function: Callable[[], T]) -> tuple[T, float]:
        world = self._groups.world_cpu
        world.barrier("start of a measurement")
        began = time.perf_counter()
        result = function()
        if self._sent.tokens_TD.is_cuda:
            torch.cuda.synchronize()
        own = time.perf_counter() - began
        return result, max(world.all_gather_objects(own, "end of a measurement"))


def minimum_inter_node_bytes(spec: ExchangeBenchmarkSpec, groups: ProcessGroups) -> dict[str, dict[str, int]]:
    """Return the minimum payload of a dispatch between nodes, summed over ranks, by format and way of sending.

    `node`: one row to each node that holds an expert of its token; `rank`: one to each rank; `expert`: one per expert.
    """
    topology, experts_TK = spec.topology, make_dispatch_inputs(spec, groups.rank, torch.device("cpu")).experts_TK
    own_node = groups.rank // spec.gpus_per_node
    visits_TE = build_destination_mask(experts_TK, spec.experts)
    rows = []
    for members in (topology.nodes_per_ep_group, topology.ep, spec.experts):
        visits_TNM = visits_TE.unflatten(1, (members, -1)).any(dim=2).unflatten(1, (topology.nodes_per_ep_group, -1))
        rows.append(visits_TNM.sum() - visits_TNM[:, own_node].sum())
    per_way = groups.world_cpu.all_reduce_sum(torch.stack(rows), "sum of needed rows").tolist()
    sizes = {
        form: RowCodec(WireFormat(form), spec.hidden, torch.bfloat16).payload_bytes_per_row for form in spec.formats
    }
    counts = dict(zip(("once_per_node", "once_per_rank", "once_per_expert"), per_way, strict=True))
    return {form: {way: count * size for way, count in counts.items()} for form, size in sizes.items()}


def run_exchange_benchmarks(rank: RankContext, spec: ExchangeBenchmarkSpec) -> dict[str, object]:
    """Benchmark every dispatcher in every format, with interleaved repeats. Collective; equal on all ranks."""
    torch.set_num_threads(1)
    groups = rank.open_groups(spec.topology)
    benches = {
        (name, form): ExchangeBenchmark(spec, name, form, groups, rank.device)
        for name in spec.exchanges
        for form in spec.formats
    }
    sent = {key: bench.measure_bytes_sent() for key, bench in benches.items()}  # also the warm-up
    runs: list[Mapping[tuple[str, str], dict[str, float]]] = [
        {key: bench.time_operations() for key, bench in benches.items()} for _ in range(spec.repeats)
    ]
    overlaps = [
        {key: bench.measure_overlap() for key, bench in benches.items()} for _ in range(spec.repeats * spec.overlap)
    ]
    rows = []
    for (name, form), bench in benches.items():
        bench.worker.close()
        seconds = {operation: median(run[name, form][operation] for run in runs) for operation in OPERATIONS}
        row: dict[str, object] = {"exchange": name, "format": form, "seconds": seconds, "bytes": sent[name, form]}
        if overlaps:
            row["overlap"] = {key: median(o[name, form][key] for o in overlaps) for key in overlaps[0][name, form]}
        rows.append(row)
    return {
        "spec": asdict(spec),
        "device": str(rank.device),
        "rows": rows,
        "minimum_inter_node_bytes": minimum_inter_node_bytes(spec, groups),
        "inter_node_bytes_counted": sum(bench.total_inter_node_bytes() for bench in benches.values()),
    }
