"""Hydra configuration groups: only YAML; the dataclasses are next to the code that they configure."""
