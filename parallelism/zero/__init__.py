"""ZeRO-1: flat buckets of parameters, reduced gradients, sharded optimizer state."""
