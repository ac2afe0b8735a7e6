"""Number formats: compute dtypes, and FP8 Linears with their backends."""
