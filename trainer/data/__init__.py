"""Text to token shards to samples in a fixed order."""
