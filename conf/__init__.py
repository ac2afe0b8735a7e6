"""Hydra configuration groups. YAML only; the types live beside the code they configure."""
