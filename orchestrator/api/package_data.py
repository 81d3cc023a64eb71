"""The tables that ship with the package: the one place that reads them, so that core and sizing read no files."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from orchestrator.api.trainable import KnownType

TRACED_LAYERS_NAME = "traced_layers.json"
MODEL_TYPES_NAME = "model_types.json"


def traced_layers() -> dict[str, Any]:
    """What decoder layers take that transformers computes, by model type; `benchmarks.layer_trace` writes it."""
    return _content(TRACED_LAYERS_NAME)


def known_type(model_type: str) -> KnownType | None:
    """A type of causal language models that transformers has; `benchmarks.models` tries each and writes it down."""
    found: dict[str, Any] | None = _content(MODEL_TYPES_NAME)["types"].get(model_type)
    if found is None:
        return None
    lists: dict[str, Any] = {name: tuple(found.get(name, ())) for name in ("classes", "layers")}
    return KnownType(**{**found, **lists})


def transformers_version() -> str:
    """Of the transformers that has those types."""
    return str(_content(MODEL_TYPES_NAME)["transformers"])


@cache
def _content(name: str) -> dict[str, Any]:
    return json.loads(files(__package__ or "").joinpath(name).read_text("utf-8"))
