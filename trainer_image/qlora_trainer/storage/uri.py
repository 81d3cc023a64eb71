"""What a URI of a store, a model or a dataset stands for on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote

from orchestrator.api.uris import claim_and_path, file_path
from qlora_trainer.outcome import UserError

PVC_ROOT_VARIABLE = "QLORA_PVC_ROOT"
DEFAULT_PVC_ROOT = "/var/lib/qlora/pvc"
"""Where claims are mounted, each in a folder of its name."""


def local_path(uri: str) -> Path | None:
    """The path behind `file:///path` or `pvc://claim/path`; None for a URI of another kind."""
    path = file_path(uri.replace("file://localhost/", "file:///", 1))
    if path is not None:
        if not path.is_absolute():
            raise UserError(f"{uri} names the host {path.parts[0]!r}: write file:///path with three slashes")
        return path
    claim, found = claim_path(uri), claim_and_path(uri)
    if claim is None or found is None:
        _refuse_detours(uri)
        return None
    path = claim / found[1].lstrip("/")
    if ".." in path.parts or not path.resolve().is_relative_to(claim.resolve()):
        raise UserError(f"{uri} leaves its claim: remove the `..` from the path")
    return path


def claim_path(uri: str) -> Path | None:
    """Where the claim behind `pvc://claim/path` is mounted; None for a URI of another kind."""
    found = claim_and_path(uri)
    if found is None:
        return None
    name, _ = found
    if name in ("", ".", "..") or "/" in unquote(name):
        raise UserError(f"{uri} names no claim: write pvc://claim/path")
    claim = Path(os.environ.get(PVC_ROOT_VARIABLE, DEFAULT_PVC_ROOT)) / name
    if not claim.is_dir():
        raise UserError(f"{uri}: the claim {name!r} is not mounted at {claim}")
    return claim


def _refuse_detours(uri: str) -> None:
    """Some object stores walk up at `..` as file systems do, and fsspec reads `::` as a second address."""
    if "::" in uri or ".." in uri.split("/"):
        raise UserError(f"{uri} must be a plain address: remove `..` and `::` from it")
