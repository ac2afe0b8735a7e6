"""Measurements of verbs in real processes: token dispatchers, the speed of this machine, memory."""
