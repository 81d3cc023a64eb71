"""From a dataset file to micro-batches."""
