"""The versions of the libraries that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "mlflow")
MEMORY_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def library_versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def memory_versions() -> str:
    """The libraries that a step's peak memory depends on, as one line."""
    found = library_versions()
    return ", ".join(f"{name} {found[name]}" for name in MEMORY_LIBRARIES if name in found)
