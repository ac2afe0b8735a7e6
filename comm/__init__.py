"""The exchange of tokens between GPUs: topology, process groups, all-to-all, byte counters. Knows no model."""
