"""Text from a trained model on one process."""
