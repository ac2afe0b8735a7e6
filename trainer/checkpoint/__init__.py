"""Checkpoints: independent of the parallel layout, verified by SHA-256, written in the background of training."""
