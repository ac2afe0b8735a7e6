"""Pretrain a frontier mixture-of-experts model inside a GPU-hour budget."""

__version__ = "0.2.0"
