"""Ledger: accounting of every GPU-millisecond of a run, compared with the published budget."""
