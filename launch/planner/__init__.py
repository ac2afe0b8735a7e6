"""Planner: forecast of a run's step time, memory and cost from measured kernels and the runtime's schedule."""
