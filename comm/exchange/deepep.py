"""Token dispatcher with DeepEP's kernels (V2, `deep_ep.ElasticBuffer`). Not yet run on hardware.

Written against the published signatures of DeepEP 2.1.0 and tested against a stand-in that has them. Its expanded
layout holds one row per (token, local expert) pair, grouped by expert, with the gates. Its combine sums those rows, so
both backward operations are the other operation with the handle of the dispatch. The order of rows within an expert
differs from run to run.

`TrafficCounter` counts nothing here: DeepEP does not report which links its bytes take. `TokenCounts` follow from the
routing.

Letters: T local tokens, K experts per token, D hidden size, L experts on this rank, P ranks of the group, N nodes,
R rows received by this rank, Q tiles of a row, X rows in general.
"""

import ctypes
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ..async_comm import AsyncCommunicator
from ..errors import Problem
from ..fp8 import QuantizedRows, dequantize, nan_placeholder, quantize, tiles_per_row
from ..groups import ExpertGroups
from ..trace import ExchangeCall
from .api import DispatchedTokens, TokenExchange
from .config import ExchangeConfig
from .deepep_buffer import DeepEPBufferShape
from .deepep_probe import probe_deepep_import
from .permutation import TokenCounts
from .wire_format import WireFormat

MIN_COMPUTE_CAPABILITY = (9, 0)
"""Lowest compute capability of DeepEP's kernels: Hopper."""
MIN_NCCL_VERSION = (2, 30, 4)
"""First NCCL with the device interface that DeepEP V2 uses."""
HIDDEN_SIZE_MULTIPLE = 256
"""Divisor of a row's width: each of a warp's 32 threads moves 16 bytes, 8 elements of BF16."""
MAX_TOP_K = 32
"""Most experts per token: a warp has one thread for each."""

_REBUILD = (
    f'run pip install --no-deps "nvidia-nccl-cu13>={".".join(map(str, MIN_NCCL_VERSION))}", which torch then loads, '
    "and build DeepEP again with it (the Dockerfile's target `deepep` does)"
)

INTER_NODE_SMS = 6
"""SMs of a dispatch or combine between nodes."""
# DeepEP's estimate (`get_theoretical_num_sms`) is wrong for node-limited routing, and its comment says so. Its README
# gives 4 to 6 SMs for training like DeepSeek-V3's.


class DeepEPExchange(TokenExchange[Any]):
    """`TokenExchange` with DeepEP's kernels. The layout of a dispatch is DeepEP's handle."""

    # All calls, and the conversion of what arrives, run on the communicator's side stream, which DeepEP's own stream
    # follows. So nothing here waits for the model, and no `previous_event` is needed.

    def __init__(
        self,
        groups: ExpertGroups,
        num_experts: int,
        async_communicator: AsyncCommunicator,
        config: ExchangeConfig,
        shape: DeepEPBufferShape,
    ) -> None:
        """Allocate DeepEP's buffers on the communicator of the group. Collective over it."""
        super().__init__(groups, num_experts, async_communicator, config=config)
        self._shape = shape
        self._sms = 0 if groups.ep_inter_node.size == 1 else INTER_NODE_SMS  # 0: DeepEP decides
        # NCCL may create a communicator only at its first collective, and DeepEP needs an existing one.
        self._group.barrier("opening DeepEP")
        library = importlib.import_module("deep_ep")
        self._index_dtype: torch.dtype = library.topk_idx_t
        seconds = math.ceil(self._group.timeout.total_seconds())
        with self._group.collective_error_context("opening DeepEP's buffers"):
            self._buffer: Any = library.ElasticBuffer(
                self._group.process_group,
                num_max_tokens_per_rank=shape.max_tokens_per_rank,
                hidden=shape.hidden_size,
                num_topk=shape.top_k,
                use_fp8_dispatch=config.dispatch == WireFormat.FP8,
                num_cpu_timeout_secs=seconds,
                num_gpu_timeout_secs=seconds,
                # Destroying the buffers is a collective, which the garbage collector must not start.
                explicitly_destroy=True,
            )

    @override
    def _dispatch(
        self, call: ExchangeCall, tokens_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, keep_quantized: bool
    ) -> Callable[[], DispatchedTokens[Any]]:
        # The first part only counts (token, rank) and (token, node) pairs; the second is DeepEP's one call, sizes
        # included.
        masks = self._destination_masks(experts_TK)
        pair_counts = self._worker.copy_to_host_async(torch.stack([mask.sum() for mask in masks]))

        def second() -> DispatchedTokens[Any]:
            # DeepEP polls for the sizes and holds the GIL meanwhile (about 2 ms per dispatch): no thread of this rank
            # that saves, averages or reads data runs. `do_cpu_sync=False` would not wait, but allocates for every token
            # of the group at min(K, L) local experts: 7.5 GB per dispatch of DeepSeek-V3 in place of 0.23, and the
            # experts would still need the sizes. A cached dispatch (`combine_backward`) neither polls nor waits.
            arrived, _, weights_R, handle = self._run(
                call,
                self._buffer.dispatch,
                _encode(self._config.dispatch, tokens_TD),
                topk_idx=experts_TK.to(self._index_dtype).contiguous(),
                topk_weights=weights_TK.to(torch.float32).contiguous(),
                num_experts=self._num_experts,
                num_max_tokens_per_rank=self._shape.max_tokens_per_rank,
                expert_alignment=1,
                num_sms=self._sms,
                do_expand=True,
            )
            rank_pairs, node_pairs = pair_counts.wait().tolist()  # no wait: DeepEP has waited for the sizes
            tokens, top_k = experts_TK.shape
            quantized = _quantized_rows(*arrived) if keep_quantized and isinstance(arrived, tuple) else None
            return DispatchedTokens(
                rows_RD=nan_placeholder(quantized.values_XD, tokens_TD.dtype)
                if quantized
                else _decode(arrived, tokens_TD.dtype),
                gate_weights_R=weights_R.to(weights_TK.dtype),
                rows_per_expert_L=tuple(handle.num_recv_tokens_per_expert_list),
                token_counts=TokenCounts(tokens, tokens * top_k, rank_pairs, node_pairs),
                label=call.label,
                layout=handle,
                quantized_rows=quantized,
            )

        return second

    @override
    def _combine(self, call: ExchangeCall, layout: Any, rows_RD: Tensor) -> Tensor:
        return self._combine_rows(call, rows_RD, None, layout)[0]

    @override
    def _combine_backward(self, call: ExchangeCall, layout: Any, grad_TD: Tensor) -> Tensor:
        # The handle sets neither the layout nor the number of SMs, and allows only the number of its dispatch.
        arrived, *_ = self._run(
            call,
            self._buffer.dispatch,
            _encode(self._config.combine_backward, grad_TD),
            num_sms=layout.num_sms,
            handle=layout,
            do_expand=True,
        )
        return _decode(arrived, grad_TD.dtype)

    @override
    def _dispatch_backward(
        self, call: ExchangeCall, layout: Any, grad_RD: Tensor, grad_weights_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        metadata_R = grad_weights_R.to(torch.float32).contiguous()
        grad_TD, grad_weights_TK = self._combine_rows(call, grad_RD, metadata_R, layout)
        assert grad_weights_TK is not None
        return grad_TD, grad_weights_TK.to(grad_weights_R.dtype)

    def _combine_rows(
        self, call: ExchangeCall, rows_RD: Tensor, metadata_R: Tensor | None, layout: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Sum the rows of each token; return the number per row in `metadata_R` by (token, choice)."""
        rows_XD = rows_RD.to(torch.bfloat16).contiguous()
        sums_TD, metadata_TK = self._run(call, self._buffer.combine, rows_XD, layout, topk_weights=metadata_R)
        return sums_TD.to(rows_RD.dtype), metadata_TK

    def _run(self, call: ExchangeCall, kernel: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """Run one of DeepEP's calls; return its results but the event at the end, for which the stream waits."""
        with self._group.collective_error_context(str(call)):
            *results, event = kernel(*arguments, async_with_compute_stream=True, **options)
            event.current_stream_wait(release_handle=True)
        return tuple(results)


def _encode(format_name: str, rows_XD: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Return the rows in BF16, or E4M3 values and their exponents, four per int32."""
    if format_name != WireFormat.FP8:
        return rows_XD.to(torch.bfloat16).contiguous()
    values_XD, exponents_XQ = quantize(rows_XD)
    return values_XD, F.pad(exponents_XQ, (0, -exponents_XQ.shape[1] % 4)).view(torch.int32)


def _decode(arrived: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the rows that `_encode` returned, [X, D], in `dtype`."""
    if isinstance(arrived, Tensor):
        return arrived.to(dtype)
    quantized = _quantized_rows(*arrived)
    return dequantize(quantized.values_XD, quantized.exponents_XQ, dtype)


def _quantized_rows(values_XD: Tensor, packed: Tensor) -> QuantizedRows:
    return QuantizedRows(values_XD, packed.view(torch.uint8)[:, : tiles_per_row(values_XD.shape[1])])


def deepep_problems(
    shape: DeepEPBufferShape,
    ranks: int,
    dtype: torch.dtype,
    device: str,
    local_ranks: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Problem]:
    """Yield a problem for each reason why `ranks` ranks, `local_ranks` of them on this machine, cannot use DeepEP."""
    reasons = (*missing_deepep_requirements(device, local_ranks, environment), *_unsupported(shape, ranks, dtype))
    for reason in reasons:
        yield Problem("exchange.name", "deepep", f"{reason}, or write exchange=two_hop")


def missing_deepep_requirements(
    device: str, local_ranks: int, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield each requirement of DeepEP that this machine lacks, with a hint.

    If only the import is left to check, a child process with the `environment` of a rank (None: of this process)
    imports deep_ep.
    """
    missing = list(_missing_requirements(device, local_ranks))
    if not missing and (failure := probe_deepep_import(environment)) is not None:
        missing.append(f"importing deep_ep fails: {failure}; {_REBUILD}")
    yield from missing


def _missing_requirements(device: str, local_ranks: int) -> Iterator[str]:
    """Yield the missing requirements that show without importing deep_ep."""
    spec = importlib.util.find_spec("deep_ep")
    build = "build version 2 of github.com/deepseek-ai/DeepEP, which needs nvcc of CUDA 12.3 or later"
    if spec is None:
        yield f"deep_ep is not installed; {build}"
    elif not any((Path(place) / "buffers" / "elastic.py").is_file() for place in spec.submodule_search_locations or ()):
        yield f"the installed deep_ep has no ElasticBuffer; {build}"
    gpus = torch.cuda.device_count()
    if device == "cpu" or gpus < local_ranks:
        there = "training.device is cpu" if device == "cpu" else f"this machine has {gpus}"
        yield f"each of {local_ranks} ranks needs a Hopper GPU and {there}; run on Hopper GPUs"
        return
    oldest = min(torch.cuda.get_device_capability(index) for index in range(local_ranks))
    if oldest < MIN_COMPUTE_CAPABILITY:
        yield (
            f"DeepEP needs a Hopper GPU (compute capability {_dotted(MIN_COMPUTE_CAPABILITY)}) and a GPU here has "
            f"{_dotted(oldest)}; run on Hopper GPUs"
        )
    loaded = loaded_nccl_version()
    if loaded < MIN_NCCL_VERSION:
        yield f"DeepEP needs NCCL {_dotted(MIN_NCCL_VERSION)} and {_dotted(loaded) or 'none'} is here; {_REBUILD}"


def _unsupported(shape: DeepEPBufferShape, ranks: int, dtype: torch.dtype) -> Iterator[str]:
    """Yield what DeepEP supports on no machine."""
    if ranks == 1:
        yield "an expert-parallel group of one rank (topology.ep=1) has nothing to exchange; write exchange=flat"
    if shape.hidden_size % HIDDEN_SIZE_MULTIPLE:
        yield f"DeepEP needs a hidden size that is a multiple of {HIDDEN_SIZE_MULTIPLE}, not {shape.hidden_size}"
    if shape.top_k > MAX_TOP_K:
        yield f"DeepEP sends a token to at most {MAX_TOP_K} experts and these go to {shape.top_k}; choose fewer"
    if dtype == torch.float64:
        yield "DeepEP carries gates in FP32, which would round these (precision.compute=float64); compute in bfloat16"


def loaded_nccl_version() -> tuple[int, ...]:
    """Return the version of the loaded NCCL; empty if there is none."""
    # `torch.cuda.nccl.version()` is that of the build, and another libnccl may be loaded in its place.
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        return ()
    code = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(code))
    return code.value // 10_000, code.value // 100 % 100, code.value % 100


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
