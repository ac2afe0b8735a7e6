"""The rehearsal: real code of any rank of a GPU run on fake CUDA tensors, and what its log says."""
