"""Event stream of a run: metrics.jsonl, the terminal, wandb, Prometheus."""
