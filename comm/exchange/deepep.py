"""The token exchange by DeepEP's kernels: its V2, `deep_ep.ElasticBuffer`. Not yet run on hardware.

Written against the signatures that DeepEP 2.1.0 publishes, and tested against a stand-in that holds them. Its expanded
layout is the one that experts want: a row for each expert of this rank that a token chose, grouped by expert, gates
beside. Its combine sums those rows again, so both backward operations are the other operation with the handle of the
dispatch. Inside an expert the rows come in any order, and in another one in each run.

`Traffic` stays empty: DeepEP does not tell which links its bytes take, and chooses by what NCCL sees of the machine.
`TokenCounts` follow from the routing and say what has to cross.

A dispatch needs its sizes on the host. DeepEP polls for them and does not release the GIL meanwhile, so no thread of
this rank that saves, averages or reads data runs until the other ranks have told theirs. Its `do_cpu_sync=False` does
not wait, and is no way out: it allocates for every token of the group at min(K, L) experts of this rank, for
DeepSeek-V3 7.5 GB a dispatch in place of 0.23, and the experts would still need the sizes. The layout of a cached
dispatch (`combine_backward`) is known; it neither polls nor waits.

Letters: T tokens of this rank, K experts a token, D hidden width, L experts on this rank, P ranks of the group,
N nodes, R rows received by this rank, Q tiles of a row, X rows anywhere.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..async_comm import AsyncCommunicator, AsyncWork, TwoPartWork
from ..errors import Problem
from ..fp8 import QuantizedRows, dequantize, nan_placeholder, quantize, tiles_per_row
from ..groups import ProcessGroups
from ..host_transfer import AsyncHostCopy
from ..trace import ExchangeCall, ExchangeLabel
from .api import DispatchedTokens
from .config import ExchangeConfig
from .deepep_buffer import DeepEPBufferShape
from .deepep_probe import probe_deepep_import
from .permutation import TokenCounts, build_destination_mask
from .wire_format import WireFormat

MIN_COMPUTE_CAPABILITY = (9, 0)
"""Compute capability that DeepEP's kernels need."""
MIN_NCCL_VERSION = (2, 30, 4)
"""The first NCCL with the device interface that V2 is built on."""
HIDDEN_SIZE_MULTIPLE = 256
"""A warp of 32 threads moves 16 bytes of BF16 each."""
MAX_TOP_K = 32
"""A warp has a thread for each of a token's experts."""

_REBUILD = (
    f'run pip install --no-deps "nvidia-nccl-cu13>={".".join(map(str, MIN_NCCL_VERSION))}", so that torch loads it too, and build '
    "DeepEP anew against it (the Dockerfile's target `deepep` does)"
)

INTER_NODE_SMS = 6
"""DeepEP's own estimate is for gates without a limit of nodes. It names 4 to 6 for training like V3's."""


@dataclass(frozen=True)
class DeepEPLayout:
    """DeepEP's handle of one dispatch."""

    handle: Any


class DeepEPExchange:
    """`TokenExchange` over one expert-parallel group. Expert e lives on rank e // L of the group.

    Calls come from the worker's stream, in whose order DeepEP's own stream follows; what arrives is converted on the
    worker's stream too, so that none of it waits for the model. For the same reason no `previous_event` is needed.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        num_experts: int,
        async_communicator: AsyncCommunicator,
        config: ExchangeConfig,
        shape: DeepEPBufferShape,
    ) -> None:
        """Collective over the group: takes its communicator and allocates the buffers."""
        self._group = groups.ep
        self._node_size = groups.topology.ep_ranks_per_node
        self._experts = num_experts
        self._worker = async_communicator
        self._config = config
        self._shape = shape
        self._sms = 0 if groups.topology.nodes_per_ep_group == 1 else INTER_NODE_SMS  # 0: as DeepEP thinks best
        # A communicator may not exist before its first collective, and DeepEP takes the one that is there.
        self._group.barrier("opening DeepEP")
        library = importlib.import_module("deep_ep")
        self._choice_dtype: torch.dtype = library.topk_idx_t
        seconds = math.ceil(self._group.timeout.total_seconds())
        with self._failing_clearly("opening DeepEP's buffers"):
            self._buffer: Any = library.ElasticBuffer(
                self._group.process_group,
                num_max_tokens_per_rank=shape.max_tokens_per_rank,
                hidden=shape.hidden_size,
                num_topk=shape.top_k,
                use_fp8_dispatch=config.dispatch == WireFormat.FP8,
                num_cpu_timeout_secs=seconds,
                num_gpu_timeout_secs=seconds,
                # Else the garbage collector would destroy them, and that is a collective. They live as long as the run.
                explicitly_destroy=True,
            )

    def dispatch(
        self,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        label: ExchangeLabel,
        *,
        keep_quantized: bool = False,
    ) -> TwoPartWork[DispatchedTokens[DeepEPLayout]]:
        """See `TokenExchange`. DeepEP exchanges sizes inside its one call and polls for them: that is the second part.

        So the kernel starts only when the host proceeds; the first part counts visits and nothing else.
        """
        call = ExchangeCall("dispatch", label)

        def first() -> Callable[[], DispatchedTokens[DeepEPLayout]]:
            visits = self._worker.copy_to_host_async(self._count_visits(experts_TK))
            return lambda: second(visits)

        def second(visits: AsyncHostCopy) -> DispatchedTokens[DeepEPLayout]:
            with self._failing_clearly(str(call)):
                arrived, _, weights_R, handle, event = self._buffer.dispatch(
                    _encode(self._config.dispatch, tokens_TD),
                    topk_idx=experts_TK.to(self._choice_dtype).contiguous(),
                    topk_weights=weights_TK.to(torch.float32).contiguous(),
                    num_experts=self._experts,
                    num_max_tokens_per_rank=self._shape.max_tokens_per_rank,
                    expert_alignment=1,
                    num_sms=self._sms,
                    async_with_compute_stream=True,
                    do_expand=True,
                )
                event.current_stream_wait(release_handle=True)
            rank_visits, node_visits = visits.wait().tolist()  # there since DeepEP has waited for the sizes
            tokens, top_k = experts_TK.shape
            tiles = _tiles(*arrived) if keep_quantized and isinstance(arrived, tuple) else None
            return DispatchedTokens(
                rows_RD=nan_placeholder(tiles.values_XD, tokens_TD.dtype)
                if tiles
                else _decode(arrived, tokens_TD.dtype),
                gate_weights_R=weights_R.to(weights_TK.dtype),
                rows_per_expert_L=tuple(handle.num_recv_tokens_per_expert_list),
                token_counts=TokenCounts(tokens, tokens * top_k, rank_visits, node_visits),
                label=label,
                layout=DeepEPLayout(handle),
                quantized_rows=tiles,
            )

        return self._worker.submit_two_part(str(call), first, (tokens_TD, weights_TK, experts_TK))

    def combine(self, rows_RD: Tensor, received: DispatchedTokens[DeepEPLayout]) -> AsyncWork[Tensor]:
        """See `TokenExchange`."""
        call = ExchangeCall("combine", received.label)

        def work() -> Tensor:
            sums_TD, _ = self._back(call, rows_RD, None, received.layout)
            return sums_TD

        return self._worker.submit(str(call), work, (rows_RD,))

    def combine_backward(self, grad_TD: Tensor, received: DispatchedTokens[DeepEPLayout]) -> AsyncWork[Tensor]:
        """See `TokenExchange`."""
        call, handle = ExchangeCall("combine_backward", received.label), received.layout.handle

        def work() -> Tensor:
            with self._failing_clearly(str(call)):
                # The handle implies neither the layout nor the number of SMs, and has room for no other number.
                arrived, _, _, _, event = self._buffer.dispatch(
                    _encode(self._config.combine_backward, grad_TD),
                    num_sms=handle.num_sms,
                    async_with_compute_stream=True,
                    handle=handle,
                    do_expand=True,
                )
                event.current_stream_wait(release_handle=True)
            return _decode(arrived, grad_TD.dtype)

        return self._worker.submit(str(call), work, (grad_TD,))

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: DispatchedTokens[DeepEPLayout]
    ) -> AsyncWork[tuple[Tensor, Tensor]]:
        """See `TokenExchange`."""
        call = ExchangeCall("dispatch_backward", received.label)

        def work() -> tuple[Tensor, Tensor]:
            beside_R = grad_weights_R.to(torch.float32).contiguous()
            grad_TD, grad_weights_TK = self._back(call, grad_RD, beside_R, received.layout)
            assert grad_weights_TK is not None
            return grad_TD, grad_weights_TK.to(grad_weights_R.dtype)

        return self._worker.submit(str(call), work, (grad_RD, grad_weights_R))

    def _back(
        self, call: ExchangeCall, rows_RD: Tensor, beside_R: Tensor | None, layout: DeepEPLayout
    ) -> tuple[Tensor, Tensor | None]:
        """Rows by expert to the sum of each token's; a number beside each row to the place of its choice."""
        with self._failing_clearly(str(call)):
            sums_TD, beside_TK, event = self._buffer.combine(
                rows_RD.to(torch.bfloat16).contiguous(),
                layout.handle,
                topk_weights=beside_R,
                async_with_compute_stream=True,
            )
            event.current_stream_wait(release_handle=True)
        return sums_TD.to(rows_RD.dtype), beside_TK

    def _count_visits(self, experts_TK: Tensor) -> Tensor:
        """[2]: how many (token, rank) and how many (token, node) pairs."""
        visits_TP = build_destination_mask(experts_TK // (self._experts // self._group.size), self._group.size)
        visits_TN = visits_TP.unflatten(1, (-1, self._node_size)).any(dim=2)
        return torch.stack((visits_TP.sum(), visits_TN.sum()))

    def _failing_clearly(self, what: str) -> AbstractContextManager[None]:
        return self._group.collective_error_context(what)


def _encode(form: str, rows_XD: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """BF16, or E4M3 and its exponents, four of them in an int32."""
    if form != WireFormat.FP8:
        return rows_XD.to(torch.bfloat16).contiguous()
    values_XD, exponents_XQ = quantize(rows_XD)
    return values_XD, F.pad(exponents_XQ, (0, -exponents_XQ.shape[1] % 4)).view(torch.int32)


def _decode(arrived: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """What `_encode` made, [X, D], as `dtype`."""
    if isinstance(arrived, Tensor):
        return arrived.to(dtype)
    tiles = _tiles(*arrived)
    return dequantize(tiles.values_XD, tiles.exponents_XQ, dtype)


def _tiles(values_XD: Tensor, packed: Tensor) -> QuantizedRows:
    return QuantizedRows(values_XD, packed.view(torch.uint8)[:, : tiles_per_row(values_XD.shape[1])])


def deepep_problems(
    shape: DeepEPBufferShape,
    ranks: int,
    dtype: torch.dtype,
    device: str,
    local_ranks: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Problem]:
    """Why `local_ranks` of this machine cannot exchange by DeepEP with `ranks` in all; see `missing_deepep_requirements`."""
    reasons = (*missing_deepep_requirements(device, local_ranks, environment), *_impossible(shape, ranks, dtype))
    for reason in reasons:
        yield Problem("exchange.name", "deepep", f"{reason}, or write exchange=two_hop")


def missing_deepep_requirements(
    device: str, local_ranks: int, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """What this machine lacks, and what to do about it.

    Where all else is here, a child process with the `environment` of a rank (None: of this process) imports deep_ep.
    This process does not.
    """
    missing = list(_missing(device, local_ranks))
    if not missing and (failure := probe_deepep_import(environment)) is not None:
        missing.append(f"importing deep_ep fails: {failure}; {_REBUILD}")
    yield from missing


def _missing(device: str, local_ranks: int) -> Iterator[str]:
    """What can be seen from here."""
    spec = importlib.util.find_spec("deep_ep")
    build = "build version 2 of github.com/deepseek-ai/DeepEP, which needs CUDA 12.3 or later with nvcc"
    if spec is None:
        yield f"deep_ep is not installed; {build}"
    elif not any((Path(place) / "buffers" / "elastic.py").is_file() for place in spec.submodule_search_locations or ()):
        yield f"the deep_ep that is installed has no ElasticBuffer; {build}"
    gpus = torch.cuda.device_count()
    if device == "cpu" or gpus < local_ranks:
        there = "training.device is cpu" if device == "cpu" else f"this machine has {gpus}"
        yield f"each of {local_ranks} ranks needs a Hopper GPU and {there}; train on such GPUs"
        return
    oldest = min(torch.cuda.get_device_capability(index) for index in range(local_ranks))
    if oldest < MIN_COMPUTE_CAPABILITY:
        yield (
            f"DeepEP needs a Hopper GPU (compute capability {_dotted(MIN_COMPUTE_CAPABILITY)}) and a GPU here has {_dotted(oldest)}; "
            "train on such GPUs"
        )
    loaded = loaded_nccl_version()
    if loaded < MIN_NCCL_VERSION:
        yield f"DeepEP needs NCCL {_dotted(MIN_NCCL_VERSION)} and {_dotted(loaded) or 'none'} is here; {_REBUILD}"


def _impossible(shape: DeepEPBufferShape, ranks: int, dtype: torch.dtype) -> Iterator[str]:
    """What DeepEP can do on no machine."""
    if ranks == 1:
        yield "a group of one rank (topology.ep=1) has nothing to exchange; write exchange=flat"
    if shape.hidden_size % HIDDEN_SIZE_MULTIPLE:
        yield f"DeepEP moves rows of whole {HIDDEN_SIZE_MULTIPLE} elements and these have {shape.hidden_size}; make them wider"
    if shape.top_k > MAX_TOP_K:
        yield f"DeepEP sends a token to at most {MAX_TOP_K} experts and these go to {shape.top_k}; choose fewer"
    if dtype == torch.float64:
        yield "DeepEP carries gates in FP32, which would round these (precision.compute=float64); compute in bfloat16"


def loaded_nccl_version() -> tuple[int, ...]:
    """The NCCL that torch has loaded: torch itself knows only the one that it was built with. Empty where none is."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        return ()
    code = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(code))
    return code.value // 10_000, code.value // 100 % 100, code.value % 100


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
