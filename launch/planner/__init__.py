"""The planner: what a run will cost, from measured kernels and the runtime's own schedule."""
