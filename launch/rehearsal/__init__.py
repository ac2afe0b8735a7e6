"""Rehearsal: the real code of any rank of a GPU run on fake CUDA tensors, and the checks of its log."""
