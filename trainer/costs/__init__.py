"""What a model costs, counted from its shapes: parameters, FLOPs, memory."""
