"""The tier on a real cluster: `make test-e2e`, which is `python -m tests.e2e_cluster`."""

CACHE_VARIABLE = "QLORA_E2E_CACHE"
"""Set inside the namespaces that `__main__` makes: the folder with programs' images. Elsewhere nothing is collected."""
