"""Data pipeline: text to token shards to samples in a fixed order."""
