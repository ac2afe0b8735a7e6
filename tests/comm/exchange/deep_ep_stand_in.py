"""A stand-in for `deep_ep` on CPU tensors: the published signatures of `ElasticBuffer`, its checks, what it computes.

Signatures, shapes, dtypes and checks follow DeepEP 2.1.0 at commit dd758ca: deep_ep/buffers/elastic.py,
csrc/elastic/buffer.hpp, deep_ep/include/deep_ep/impls/*.cuh. Only the expanded layout without padding is here, which is
all that the adapter asks for. Stricter than the original, so that a test sees what hardware would punish by luck:

* results are NaN, or exponents of NaN, until a stream waits for the event;
* the rows of an expert come in descending order of their source.

Letters: T tokens, D width, K experts per token, R rows received, P ranks, L experts per rank, S packed scales.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

HIDDEN_STEP = 256  # combine.cuh: 32 lanes of 16 bytes of BF16


@dataclass(frozen=True)
class EPHandle:
    """The attributes that users may read; where each row came from stands for DeepEP's own tensors."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    sources: tuple[tuple[int, int, int], ...]
    """One triple per row: rank, token, index among the token's choices."""


class EventOverlap:
    """An event that completes when a stream waits for it; the results do not exist before."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.event: Callable[[], None] | None = happens

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None
        self.event()
        if release_handle:
            self.event = None


class ElasticBuffer:
    """A collective over a gloo group; keeps the arguments of its calls."""

    log: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 -- shared by all buffers of the process

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "group")}
        assert type(num_cpu_timeout_secs) is int
        assert type(num_gpu_timeout_secs) is int
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        assert hidden % HIDDEN_STEP == 0
        assert allow_multiple_reduction, "expanded rows with weights need it (combine.cuh)"
        self._group = group
        assert self._from_all(arguments) == [arguments] * group.size(), "the ranks open different buffers"
        self._tokens, self._hidden, self._fp8_only = num_max_tokens_per_rank, hidden, use_fp8_dispatch
        self.log.append(("open", arguments))

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: object | None = None,
        previous_event_before_epilogue: object | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], None, Tensor | None, EPHandle, EventOverlap]:
        self._record("dispatch", locals())
        assert do_expand, "the stand-in knows no other layout"
        assert expert_alignment in (None, 1)
        assert previous_event is None or allocate_on_comm_stream
        assert num_sms or num_experts is not None, "the automatic number of SMs needs num_experts"
        rows_TD, scales_TS = x if isinstance(x, tuple) else (x, None)
        self._check_rows(rows_TD, scales_TS)
        is_cached = handle is not None
        if handle is None:
            assert topk_idx is not None
            assert num_experts is not None
            handle = self._route(rows_TD, topk_idx, num_experts, num_max_tokens_per_rank, num_sms)
        else:
            assert topk_idx is None
            assert not do_cpu_sync
            assert handle.do_expand == do_expand
            assert handle.num_sms == num_sms, "other channels than the handle's"
            assert num_experts in (None, handle.num_experts)
            assert len(rows_TD) == len(handle.topk_idx)
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape == handle.topk_idx.shape
        assert topk_weights is not None or is_cached
        recv_x = self._gather(rows_TD, handle)
        recv_sf = None if scales_TS is None else self._gather(scales_TS, handle)
        weights_R = None
        if topk_weights is not None:
            weights_PTK = self._from_all(topk_weights)
            weights_R = topk_weights.new_tensor(
                [weights_PTK[rank][token, choice] for rank, token, choice in handle.sources]
            )
        hidden = [tensor for tensor in (recv_x, recv_sf, weights_R) if tensor is not None]
        event = self._event(hidden, async_with_compute_stream)
        return recv_x if recv_sf is None else (recv_x, recv_sf), None, weights_R, handle, event

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: object | None = None,
        previous_event_before_epilogue: object | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self._record("combine", locals())
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape == (len(handle.sources), self._hidden)
        assert num_sms in (0, handle.num_sms)
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape == (len(x),)
        combined_x = x.new_zeros((len(handle.topk_idx), self._hidden), dtype=torch.float32)
        combined_weights = torch.zeros(handle.topk_idx.shape)
        rank = self._group.rank()
        for rows_RD, weights_R, sources in self._from_all((x, topk_weights, handle.sources)):
            # A rank sums the rows of one token in FP32, sends the sum in BF16, and the token's rank sums those.
            sums_TD = torch.zeros_like(combined_x)
            for row, (source, token, choice) in enumerate(sources):
                if source == rank:
                    sums_TD[token] += rows_RD[row]
                    if weights_R is not None:
                        combined_weights[token, choice] = weights_R[row]
            combined_x += sums_TD.to(torch.bfloat16)
        result = combined_x.to(torch.bfloat16)
        event = self._event([result, combined_weights], async_with_compute_stream)
        return result, None if topk_weights is None else combined_weights, event

    def _route(
        self, rows_TD: Tensor, topk_idx: Tensor, num_experts: int, num_max_tokens_per_rank: int | None, num_sms: int
    ) -> EPHandle:
        """Return which rank receives which tokens, from the choices of all ranks."""
        ranks, most = self._group.size(), num_max_tokens_per_rank or self._tokens
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        assert len(topk_idx) == len(rows_TD) <= most
        assert num_experts % ranks == 0
        assert all(len(set(row)) == len(row) for row in topk_idx.tolist()), "an expert chosen twice"
        same = (num_experts, most, num_sms)
        everyone = self._from_all((topk_idx, same))
        assert all(other == same for _, other in everyone), "the ranks dispatch differently"
        local = num_experts // ranks
        choices: list[list[tuple[int, int, int]]] = [[] for _ in range(local)]
        for rank, (experts_TK, _) in enumerate(everyone):
            for token, row in enumerate(experts_TK.tolist()):
                for choice, expert in enumerate(row):
                    if expert // local == self._group.rank():
                        choices[expert % local].append((rank, token, choice))
        return EPHandle(
            do_expand=True,
            num_experts=num_experts,
            expert_alignment=1,
            num_max_tokens_per_rank=most,
            num_sms=num_sms or 24,
            topk_idx=topk_idx.clone(),
            num_recv_tokens_per_expert_list=[len(of_expert) for of_expert in choices],
            sources=tuple(source for of_expert in choices for source in reversed(of_expert)),
        )

    def _check_rows(self, rows_TD: Tensor, scales_TS: Tensor | None) -> None:
        assert rows_TD.is_contiguous()
        assert rows_TD.shape[1] == self._hidden
        assert rows_TD.dtype == (torch.bfloat16 if scales_TS is None else torch.float8_e4m3fn)
        assert scales_TS is not None or not self._fp8_only, "BF16 rows do not fit buffers made for FP8"
        if scales_TS is not None:
            assert scales_TS.dtype in (torch.float32, torch.int32), "FP32 or four packed UE8M0"
            tiles = self._hidden // 128
            packed = -(-tiles // 4) if scales_TS.dtype == torch.int32 else tiles
            assert scales_TS.shape == (len(rows_TD), packed)

    def _gather(self, rows_TX: Tensor, handle: EPHandle) -> Tensor:
        """[R, any]: the rows that `handle` says this rank has. Collective; in bytes because FP8 cannot be pickled."""
        bytes_PTB = self._from_all(rows_TX.view(torch.uint8))
        rows = [bytes_PTB[rank][token] for rank, token, _ in handle.sources]
        return torch.stack(rows).view(rows_TX.dtype) if rows else rows_TX.new_empty((0, rows_TX.shape[1]))

    def _event(self, results: list[Tensor], is_async: bool) -> EventOverlap:
        """Hide the results until the event, unless the caller's stream waits anyway."""
        true = [result.view(torch.uint8).clone() for result in results]

        def happens() -> None:
            for result, value in zip(results, true, strict=True):
                result.view(torch.uint8).copy_(value)

        if is_async:
            for result in results:
                result.view(torch.uint8).fill_(255)  # NaN in BF16, FP32, E4M3, E8M0
        return EventOverlap(happens)

    def _from_all(self, value: T) -> list[T]:
        values: list[T] = [value] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _record(self, name: str, arguments: dict[str, Any]) -> None:
        self.log.append((name, {key: value for key, value in arguments.items() if key != "self"}))


topk_idx_t = torch.int64


def install() -> list[tuple[str, dict[str, Any]]]:
    """Make `import deep_ep` find the stand-in in this process; return the log of its calls."""
    module = ModuleType("deep_ep")
    module.__spec__ = ModuleSpec("deep_ep", None)
    module.__dict__.update(
        ElasticBuffer=ElasticBuffer, EPHandle=EPHandle, EventOverlap=EventOverlap, topk_idx_t=topk_idx_t
    )
    sys.modules["deep_ep"] = module
    ElasticBuffer.log.clear()
    return ElasticBuffer.log
