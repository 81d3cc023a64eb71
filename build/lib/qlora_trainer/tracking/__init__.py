"""MLflow, seen from the trainer: the job's run, and the registry.

These are the only files of the trainer that import mlflow, and only when it is used.
"""
