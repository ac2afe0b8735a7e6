"""Checkpoints that travel: independent of layout, verified, written beside the training."""
