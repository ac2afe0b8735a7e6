"""The connection model: whether the logs of all rehearsed ranks can run to their end on NCCL."""
