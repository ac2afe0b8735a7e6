"""Costs of a model, counted from its shapes: parameters and FLOPs; and the hardware that pays them."""
