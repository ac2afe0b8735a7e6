"""Training: model, data, optimizer, checkpoints, ledger, telemetry, and the loop that uses them."""
