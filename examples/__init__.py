"""Runnable examples: the demos behind `make demo` and `make demo-preempt`, and manifests to start from."""
