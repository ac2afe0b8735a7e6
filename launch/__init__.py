"""Command line, configuration and the launch of ranks under torchrun."""
