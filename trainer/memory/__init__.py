"""Bytes that each rank of a run needs, predicted from shapes and measured in real processes."""
