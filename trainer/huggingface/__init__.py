"""To and from Hugging Face: DeepSeek-V3 as transformers and the released weights write it."""
