"""Activations that are made again in the backward instead of being kept from the forward on (report §3.2.3).

The model says of some of its functions which part of a layer they make (`run_recomputable`). Where the policy names that
part, autograd keeps a recipe instead of the results, the function and its inputs, wherever it would keep a result. Who
needs one first in the backward makes it again; it goes when the last one has had it. The function is the same on the
same numbers, so the gradients are those of a run that keeps everything, to the last bit.

Neither an exchange nor the choice of experts is one of these functions: tokens are sent once, and go where they went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from ...comm.errors import Problem
from ...comm.fp8 import TILE_WIDTH, tiles_per_row

T = TypeVar("T", Tensor, tuple[Tensor, ...])


class RecomputeModule(StrEnum):
    """What can be made again."""

    NORM = "norm"  # what RMSNorms give
    UP_PROJECTION = "up_projection"  # queries, keys and values, from the compressed vectors (without these, the norm)
    ATTENTION = "attention"  # what attention gives, and its probabilities
    GATE_UP = "gate_up"  # gate and up projections of experts and of dense layers
    SWIGLU = "swiglu"  # what their down projections take


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Which activations are made again in the backward, to have memory for others."""

    modules: tuple[str, ...] = ()
    """Any of `norm`, `up_projection`, `attention`, `gate_up` and `swiglu`; the report's are the first two and the last.
    The numbers are the same to the last bit. A backward that is split in I and W keeps what I has made again until W.
    """
    expert_block_rows: int | None = None
    """Rows that the experts of one rank compute at once. A rank that receives more computes them in blocks, keeps the
    rows alone and makes the rest again: routing that sends everything to one rank makes it slow, and does not end the
    run for want of memory (`shoestring memory` says what it takes at most). null: twice a rank's even share."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        known = [part.value for part in RecomputeModule]
        for index, part in enumerate(self.modules):
            if part not in known:
                yield Problem(f"parts[{index}]", part, f"no such part of a layer; there are: {', '.join(known)}")
            elif part in self.modules[:index]:
                yield Problem(f"parts[{index}]", part, "is there already; write it once")
        if self.expert_block_rows is not None and (
            self.expert_block_rows < TILE_WIDTH or self.expert_block_rows % TILE_WIDTH
        ):
            hint = f"must be a multiple of {TILE_WIDTH}, which are the rows of an FP8 tile; or null"
            yield Problem("expert_block_rows", self.expert_block_rows, hint)

    def resolve_expert_block_rows(self, average_rows: int) -> int:
        """The same as a number, for a rank whose even share are `even` rows."""
        return (
            TILE_WIDTH * tiles_per_row(2 * average_rows) if self.expert_block_rows is None else self.expert_block_rows
        )

    @property
    def recompute_modules(self) -> frozenset[RecomputeModule]:
        """The same as a set."""
        return frozenset(map(RecomputeModule, self.modules))


class SelectiveRecompute:
    """A policy at work, in all phases of a chunk: one may keep what another has made."""

    def __init__(self, modules: frozenset[RecomputeModule] = frozenset()) -> None:
        self.modules = modules
        # By storage, for as long as that lives: what autograd keeps is often a view of a result.
        self._results = WeakIdKeyDictionary()

    @contextmanager
    def enable(self) -> Iterator[None]:
        """Functions that run forward inside are recomputed where the policy says so."""
        if not self.modules or not torch.is_grad_enabled():
            yield
            return
        token = _COLLECTING.set(self)
        try:
            with saved_tensors_hooks(self.pack_saved_tensor, unpack_for_backward):
                yield
        finally:
            _COLLECTING.reset(token)

    def register(self, function: Callable[..., T], inputs: tuple[Any, ...], results: T) -> None:
        """Remember how `results` were made. One that lies in an input's memory is that input, and not made at all."""
        held = {id(x.untyped_storage()) for x in inputs if isinstance(x, Tensor)}
        recipe = _Recipe(
            function, tuple(self.pack_saved_tensor(x.detach()) if isinstance(x, Tensor) else x for x in inputs)
        )
        for index, result in enumerate(_as_tuple(results)):
            if id(result.untyped_storage()) not in held:
                self._results[result.untyped_storage()] = recipe, index

    def will_recompute(self, tensor: Tensor) -> bool:
        """Whether there is a recipe for it."""
        return tensor.untyped_storage() in self._results

    def pack_saved_tensor(self, tensor: Tensor) -> Tensor | _View:
        """What to keep of `tensor`: see `unpack_for_backward`."""
        found = self._results.get(tensor.untyped_storage())
        if found is None:
            return tensor
        recipe, index = found
        return _View(recipe, index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def run_recomputable(part: RecomputeModule, function: Callable[..., T], *inputs: Any) -> T:
    """`function(*inputs)`; a tensor, or a tuple of them. The policy may have it made again when it is needed.

    The function must depend on nothing but its inputs and weights, and give the same bits each time.
    """
    results = function(*inputs)
    recompute = _COLLECTING.get()
    if recompute is not None and part in recompute.modules:
        recompute.register(function, inputs, results)
    return results


def run_checkpointed(part: RecomputeModule, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The same for a function without weights, of which nothing inside is kept either: its backward runs it anew."""
    recompute = _COLLECTING.get()
    if recompute is None or part not in recompute.modules:
        return function(*inputs)

    def replay(*inputs: Any) -> Tensor:
        result: Tensor = _Replayed.apply(function, *inputs)  # type: ignore[no-untyped-call]
        return result

    return run_recomputable(part, replay, *inputs)


def will_be_recomputed(tensor: Tensor) -> bool:
    """Whether the policy has `tensor` made again, so that who wants it in a backward should ask for it as it is."""
    recompute = _COLLECTING.get()
    return recompute is not None and recompute.will_recompute(tensor)


def pack_for_backward(tensor: Tensor) -> Any:
    """What autograd keeps of `tensor` under the policy at work: for other hooks, which stand before the policy's."""
    recompute = _COLLECTING.get()
    return tensor if recompute is None else recompute.pack_saved_tensor(tensor)


_COLLECTING: ContextVar[SelectiveRecompute | None] = ContextVar("collecting recipes", default=None)


class _Recipe:
    """A function and its inputs, until its results are needed; then these, until nobody may ask for them any more."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self._function, self._inputs = function, inputs
        self._results: tuple[Tensor, ...] = ()

    def result(self, index: int) -> Tensor:
        if not self._results:
            with torch.no_grad():
                self._results = _as_tuple(self._function(*map(unpack_for_backward, self._inputs)))
            self._inputs = ()
        return self._results[index]


@dataclass(frozen=True)
class _View:
    """Stands for a tensor that lies in a recipe's result."""

    recipe: _Recipe
    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.result(self.index).as_strided(self.shape, self.stride, self.offset)


def unpack_for_backward(kept: Any) -> Any:
    """The tensor that `pack_for_backward` has kept so; made again where there is a recipe for it."""
    return kept.tensor() if isinstance(kept, _View) else kept


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


class _Replayed(torch.autograd.Function):
    """Keeps the tensors that a function takes, and none that it makes on its way."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.function, ctx.others = function, [None if isinstance(x, Tensor) else x for x in inputs]
        return function(*(x.detach() if isinstance(x, Tensor) else x for x in inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        left = iter(tensors)
        with torch.enable_grad():
            result = ctx.function(*(next(left) if other is None else other for other in ctx.others))
        found = iter(torch.autograd.grad(result, tensors, grads))
        return (None, *(next(found) if other is None else None for other in ctx.others))
