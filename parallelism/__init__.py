"""How a training step is spread over ranks: pipeline programs, gradient reduction, ZeRO-1. Knows no model."""
