"""Selective activation recomputation: saved activations are replaced by recomputation in the backward (report §3.2.3).

The model marks its recomputable functions with the module that they belong to (`run_recomputable`). If the policy names
that module, autograd saves a recipe, the function and its inputs, instead of each result. The first backward that needs
a result recomputes it; the last one frees it. The same function runs on the same numbers, so the gradients are equal to
those without recomputation, to the last bit.

Neither the token exchange nor the selection of experts is recomputed: no token is sent twice.
"""

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
from typing_extensions import override

from ...comm.errors import Problem
from ...comm.files.ranges import CheckedConfig
from ...comm.fp8 import TILE_WIDTH, tiles_per_row

T = TypeVar("T", Tensor, tuple[Tensor, ...])


class RecomputeModule(StrEnum):
    """Part of a layer whose results can be recomputed."""

    NORM = "norm"  # outputs of RMSNorms
    UP_PROJECTION = "up_projection"  # queries, keys and values, from the compressed vectors (without these, the norm)
    ATTENTION = "attention"  # outputs of attention, and its probabilities
    GATE_UP = "gate_up"  # gate and up projections of experts and of dense layers
    SWIGLU = "swiglu"  # inputs of their down projections


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig(CheckedConfig):
    """Activations that are recomputed in the backward instead of saved, and the row blocks of experts."""

    modules: tuple[str, ...] = ()
    """Any of `norm`, `up_projection`, `attention`, `gate_up` and `swiglu`; the report recomputes `norm`,
    `up_projection` and `swiglu`. Results are identical to the last bit."""
    expert_block_rows: int | None = None
    """Largest number of rows that the experts of one rank compute in one call, a multiple of 128; null: twice a rank's
    average. A rank that receives more computes them in blocks and recomputes everything but the rows, so that uneven
    routing makes it slower instead of running out of memory (`shoestring memory` prints the worst case)."""

    @override
    def rule_problems(self) -> Iterator[Problem]:
        known = [part.value for part in RecomputeModule]
        for index, part in enumerate(self.modules):
            if part not in known:
                yield Problem(f"modules[{index}]", part, f"no such module; there are: {', '.join(known)}")
            elif part in self.modules[:index]:
                yield Problem(f"modules[{index}]", part, "is listed twice; remove one")
        if self.expert_block_rows is not None and (
            self.expert_block_rows < TILE_WIDTH or self.expert_block_rows % TILE_WIDTH
        ):
            hint = f"must be a multiple of {TILE_WIDTH}, the rows of an FP8 tile, or null"
            yield Problem("expert_block_rows", self.expert_block_rows, hint)

    def resolve_expert_block_rows(self, average_rows: int) -> int:
        """Return `expert_block_rows` as a number, for a rank that receives `average_rows` with even routing."""
        return (
            TILE_WIDTH * tiles_per_row(2 * average_rows) if self.expert_block_rows is None else self.expert_block_rows
        )

    @property
    def recompute_modules(self) -> frozenset[RecomputeModule]:
        """The `modules` as a set."""
        return frozenset(map(RecomputeModule, self.modules))


class SelectiveRecompute:
    """Recompute policy in effect, shared by all phases of a chunk: one phase may save the result of another."""

    def __init__(self, modules: frozenset[RecomputeModule] = frozenset()) -> None:
        self.modules = modules
        # Keyed by storage, weakly: autograd often saves a view of a result, and a recipe must not outlive the memory.
        self._results = WeakIdKeyDictionary()

    @contextmanager
    def enable(self) -> Iterator[None]:
        """Return a context in which functions of the policy's modules are recomputed in their backward."""
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
        """Remember the recipe of `results`."""
        # A result in an input's memory is that input (a view of it), and needs no recipe.
        held = {id(x.untyped_storage()) for x in inputs if isinstance(x, Tensor)}
        recipe = _Recipe(
            function, tuple(self.pack_saved_tensor(x.detach()) if isinstance(x, Tensor) else x for x in inputs)
        )
        for index, result in enumerate(_as_tuple(results)):
            if id(result.untyped_storage()) not in held:
                self._results[result.untyped_storage()] = recipe, index

    def will_recompute(self, tensor: Tensor) -> bool:
        """Return True if there is a recipe for `tensor`."""
        return tensor.untyped_storage() in self._results

    def pack_saved_tensor(self, tensor: Tensor) -> "Tensor | _View":
        """Return what autograd saves for `tensor`: the tensor, or a view of a recipe's result to recompute it from."""
        found = self._results.get(tensor.untyped_storage())
        if found is None:
            return tensor
        recipe, index = found
        return _View(recipe, index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def run_recomputable(part: RecomputeModule, function: Callable[..., T], *inputs: Any) -> T:
    """Return `function(*inputs)`, a tensor or a tuple of tensors that the policy may recompute in the backward.

    The function must depend only on its inputs and weights, and return the same bits in every call.
    """
    results = function(*inputs)
    recompute = _COLLECTING.get()
    if recompute is not None and part in recompute.modules:
        recompute.register(function, inputs, results)
    return results


def run_checkpointed(part: RecomputeModule, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return `function(*inputs)` of a function without weights; under the policy its backward saves only the inputs."""
    recompute = _COLLECTING.get()
    if recompute is None or part not in recompute.modules:
        return function(*inputs)

    def replay(*inputs: Any) -> Tensor:
        result: Tensor = _Replayed.apply(function, *inputs)  # type: ignore[no-untyped-call]
        return result

    return run_recomputable(part, replay, *inputs)


def will_be_recomputed(tensor: Tensor) -> bool:
    """Return True if the policy recomputes `tensor`: its user should then save the tensor itself, not a copy of it."""
    recompute = _COLLECTING.get()
    return recompute is not None and recompute.will_recompute(tensor)


def pack_for_backward(tensor: Tensor) -> Any:
    """Return what autograd saves for `tensor` under the active policy."""
    # For other saved_tensors_hooks: torch calls only the innermost pair, so these must apply the policy themselves.
    recompute = _COLLECTING.get()
    return tensor if recompute is None else recompute.pack_saved_tensor(tensor)


_COLLECTING: ContextVar[SelectiveRecompute | None] = ContextVar("collecting recipes", default=None)


class _Recipe:
    """Function and its inputs, replaced by its results when they are first needed."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self._function, self._inputs = function, inputs
        self._results: tuple[Tensor, ...] = ()

    def result(self, index: int) -> Tensor:
        if not self._results:
            with torch.no_grad():
                self._results = _as_tuple(self._function(*map(unpack_for_backward, self._inputs)))
            self._inputs = ()  # they would hold memory that the recomputation was meant to free
        return self._results[index]


@dataclass(frozen=True)
class _View:
    """View of a recipe's result, saved by autograd in place of a tensor."""

    recipe: _Recipe
    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.result(self.index).as_strided(self.shape, self.stride, self.offset)


def unpack_for_backward(kept: Any) -> Any:
    """Return the tensor that `pack_for_backward` packed, recomputed if there is a recipe for it."""
    return kept.tensor() if isinstance(kept, _View) else kept


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


class _Replayed(torch.autograd.Function):
    """Function that saves its input tensors only, and runs again in its backward."""

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
