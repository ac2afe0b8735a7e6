"""Nodes simulated on one machine, for tests of multi-node runs."""
