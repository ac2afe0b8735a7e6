"""The way in: command line, configuration, torchrun."""
