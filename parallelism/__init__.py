"""Pipeline programs, delayed weight gradients, gradient reduction and ZeRO-1. Independent of the model."""
