"""What a model costs: parameters and FLOPs, counted from its shapes."""
