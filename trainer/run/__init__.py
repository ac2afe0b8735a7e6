"""One training run: the step, its stages, evaluation, checkpoints, reporting, exit."""
