"""One training run: model, data, optimizer, checkpoints, ledger, telemetry, and the loop that joins them."""
