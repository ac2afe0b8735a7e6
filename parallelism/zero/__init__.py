"""ZeRO-1: flat buckets of parameters, reduced gradients, sharded optimizer state."""

from .optimizer import OptimizerUpdate, ShardedOptimizer

__all__ = ["OptimizerUpdate", "ShardedOptimizer"]
