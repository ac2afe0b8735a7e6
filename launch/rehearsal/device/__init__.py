"""Fake GPU that computes nothing: fake CUDA tensors and fake communicators."""
