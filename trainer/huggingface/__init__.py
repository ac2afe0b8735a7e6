"""Import and export of Hugging Face checkpoints of DeepSeek-V3."""
