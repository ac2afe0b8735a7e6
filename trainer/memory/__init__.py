"""Memory of each rank of a run, predicted from shapes and measured in real processes."""
