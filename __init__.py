"""Pretrain a frontier mixture-of-experts model inside a GPU-hour budget."""
