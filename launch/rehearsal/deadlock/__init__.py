"""Deadlock check: a simulation of NCCL that detects hangs in the logs of all rehearsed ranks."""
