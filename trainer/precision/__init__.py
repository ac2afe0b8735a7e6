"""Numeric formats: which dtype computes, the Linear of the model, and its products in FP8 with their providers."""
