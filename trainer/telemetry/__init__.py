"""One event stream a run: metrics.jsonl, the terminal, wandb."""
