"""A schedule of the learning rate with every part: warm-up to 100 tokens, constant to 400, cosine to 1000."""

from shoestring.trainer.optimizer.config import OptimizerConfig

RATES = OptimizerConfig(
    peak_learning_rate=2.2e-4,
    final_learning_rate=2.2e-5,
    warmup_tokens=100,
    constant_tokens=300,
    decay_tokens=600,
)
