"""DeepSeek-V3 in PyTorch, one file a part, written as the five phases that the exchange cuts each layer into."""
