"""Every recompute policy."""

from itertools import combinations

from shoestring.trainer.model.recompute import RecomputeModule

POLICIES = [
    frozenset(parts) for size in range(len(RecomputeModule) + 1) for parts in combinations(RecomputeModule, size)
]


def names(policy: frozenset[RecomputeModule]) -> str:
    return "+".join(sorted(policy)) or "nothing"
