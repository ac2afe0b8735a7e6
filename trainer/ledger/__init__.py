"""The ledger: every GPU-millisecond of a run, against the published budget."""
