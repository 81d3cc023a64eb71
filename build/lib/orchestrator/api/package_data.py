"""The tables that ship with the package: the one place that reads them, so that core and sizing read no files."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

TRACED_LAYERS_NAME = "traced_layers.json"


@cache
def traced_layers() -> dict[str, Any]:
    """What decoder layers take that transformers computes, by model type; `benchmarks.layer_trace` writes it."""
    return json.loads(files(__package__ or "").joinpath(TRACED_LAYERS_NAME).read_text("utf-8"))
