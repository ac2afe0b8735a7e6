"""DeepSeek-V3 in PyTorch, one file per part; the token exchange splits each MoE layer into five phases."""
