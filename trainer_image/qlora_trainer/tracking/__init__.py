"""MLflow, seen from the trainer."""
