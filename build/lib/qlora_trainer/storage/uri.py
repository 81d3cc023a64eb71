"""What a URI of a store, a model or a dataset stands for on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_trainer.outcome import UserError

PVC_ROOT_VARIABLE = "QLORA_PVC_ROOT"
DEFAULT_PVC_ROOT = "/var/lib/qlora/pvc"
"""Where claims are mounted, each in a folder of its name."""


def local_path(uri: str) -> Path | None:
    """The path behind `file:///path` or `pvc://claim/path`; None for a URI of another kind."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{uri} names the host {parts.netloc!r}: write file:///path with three slashes")
        return Path(unquote(parts.path))
    claim = claim_path(uri)
    if claim is None:
        _refuse_detours(uri)
        return None
    path = claim / unquote(parts.path).lstrip("/")
    if ".." in path.parts or not path.resolve().is_relative_to(claim.resolve()):
        raise UserError(f"{uri} leaves its claim: remove the `..` from the path")
    return path


def claim_path(uri: str) -> Path | None:
    """Where the claim behind `pvc://claim/path` is mounted; None for a URI of another kind."""
    parts = urlsplit(uri)
    if parts.scheme != "pvc":
        return None
    if parts.netloc in ("", ".", "..") or "/" in unquote(parts.netloc):
        raise UserError(f"{uri} names no claim: write pvc://claim/path")
    claim = Path(os.environ.get(PVC_ROOT_VARIABLE, DEFAULT_PVC_ROOT)) / parts.netloc
    if not claim.is_dir():
        raise UserError(f"{uri}: the claim {parts.netloc!r} is not mounted at {claim}")
    return claim


def _refuse_detours(uri: str) -> None:
    """Some object stores walk up at `..` as file systems do, and fsspec reads `::` as a second address."""
    if "::" in uri or ".." in uri.split("/"):
        raise UserError(f"{uri} must be a plain address: remove `..` and `::` from it")
