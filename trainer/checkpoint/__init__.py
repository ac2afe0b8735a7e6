"""Atomic distributed checkpoints."""
