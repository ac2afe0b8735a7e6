"""A run of four ranks that rehearses in seconds."""

SMALL = (
    *("experiment=quickstart", "schedule=1f1b", "schedule.micro_batch_size=1", "training.global_batch_size=4"),
    *("training.sequence_length=32", "model.num_nextn_predict_layers=0"),
)
"""Two pipeline ranks of two layers each, experts over two ranks, two micro-batches."""
