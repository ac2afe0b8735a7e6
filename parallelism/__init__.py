"""How a training step is spread over ranks: gradient reduction and the global norm. Knows no model."""
