"""The Python client: submit, plan, watch, logs, cancel, result."""
