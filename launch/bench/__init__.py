"""What verbs measure in real processes: the token exchange, this machine's speed, memory."""
