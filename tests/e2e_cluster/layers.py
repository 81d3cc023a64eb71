"""Hands buildah's images to containerd without a copy: layers become snapshots by hard links.

`images.py` calls `share_images` after a build. Pushing and pulling an image would write each of its layers three times,
and the trainer's holds a CUDA build of torch. Both programs keep a layer as a folder that overlayfs stacks, with the
same whiteouts, so that a tree of hard links to buildah's folder, committed under the layer's chain ID, is the snapshot
that containerd would have unpacked. When a node then pulls the image from `registry.py`, it asks for manifest and
configuration, finds each layer unpacked, and downloads none.

What is read here of buildah's storage is the format that all of the containers/storage programs share.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e_cluster.daemons import Daemon, wait_until
from tests.e2e_cluster.registry import REFERENCE

START_SECONDS = 30.0
LINK_SECONDS = 300.0
CONFIGURATION = """
version = 2
root = "{root}"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{folder}/socket"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """An image as buildah keeps it."""

    manifest: bytes
    configuration: bytes
    layers: tuple[Path, ...]
    """The folders of its layers, lowest first."""

    @property
    def chain_ids(self) -> tuple[str, ...]:
        """What containerd calls the snapshot of each layer on top of those below it."""
        chain: list[str] = []
        for diff_id in json.loads(self.configuration)["rootfs"]["diff_ids"]:
            chain.append(_digest(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
        return tuple(chain)


def share_images(storage: Path, root: Path, layout: Path, names: Mapping[str, str]) -> None:
    """Put images of buildah's storage into a containerd's root as snapshots, and into a layout for the registry.

    `names` maps what buildah calls an image to what nodes call it. Snapshots that are there already stay.
    """
    images = {reference: find_image(storage, name) for name, reference in names.items()}
    with _containerd(root) as ctr:
        for image in images.values():
            _add_snapshots(ctr, image)
    _write_layout(layout, images)


def find_image(storage: Path, name: str) -> StoredImage:
    """The image that buildah knows by this name."""
    images = json.loads((storage / "overlay-images" / "images.json").read_text())
    entry = next(image for image in images if name in (image.get("names") or ()))
    folder = storage / "overlay-images" / entry["id"]
    configuration = f"sha256:{entry['id']}"
    return StoredImage(
        manifest=(folder / "manifest").read_bytes(),
        configuration=(folder / f"={base64.b64encode(configuration.encode()).decode()}").read_bytes(),
        layers=tuple(_layer_folders(storage, entry["layer"])),
    )


def _layer_folders(storage: Path, top: str) -> list[Path]:
    layers = {layer["id"]: layer for layer in json.loads((storage / "overlay-layers" / "layers.json").read_text())}
    folders: list[Path] = []
    name: str | None = top
    while name:
        folders.insert(0, storage / "overlay" / name / "diff")
        name = layers[name].get("parent")
    return folders


class _Ctr:
    """containerd's command line on one socket."""

    def __init__(self, socket: Path) -> None:
        self._command = ["ctr", "--address", str(socket), "--namespace", "k8s.io"]

    def __call__(self, *arguments: str) -> str:
        """What a command prints; fails with what it says."""
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"ctr {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout


@contextmanager
def _containerd(root: Path) -> Generator[_Ctr]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.toml").write_text(CONFIGURATION.format(root=root, folder=folder))
        daemon = Daemon("containerd", ["containerd", "--config", folder / "config.toml"], folder / "log")
        try:
            wait_until("containerd's socket", (folder / "socket").exists, START_SECONDS, daemon)
            yield _Ctr(folder / "socket")
        finally:
            daemon.stop()


def _add_snapshots(ctr: _Ctr, image: StoredImage) -> None:
    present = set(ctr("snapshots", "list").split())
    parent = ""
    for folder, chain_id in zip(image.layers, image.chain_ids, strict=True):
        if chain_id not in present:
            work = f"linking-{chain_id}"
            if work in present:  # of an interrupted run
                ctr("snapshots", "remove", work)
            ctr("snapshots", "prepare", work, *([parent] if parent else []))
            # Either a bind mount of the folder, or an overlay that has it as its upper one.
            mount = ctr("snapshots", "mounts", "/target", work)
            target = re.search(r"upperdir=([^,\s]+)", mount) or re.search(r"\s(/\S+/fs)\s", mount)
            assert target, mount
            copy = ["cp", "--archive", "--link", "--force", f"{folder}/.", target[1]]
            subprocess.run(copy, check=True, timeout=LINK_SECONDS)
            ctr("snapshots", "commit", chain_id, work)
        parent = chain_id


def _write_layout(layout: Path, images: Mapping[str, StoredImage]) -> None:
    """Manifests and configurations, and no layers, because nobody will ask for them."""
    shutil.rmtree(layout, ignore_errors=True)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for reference, image in images.items():
        for blob in (image.manifest, image.configuration):
            (blobs / _digest(blob).removeprefix("sha256:")).write_bytes(blob)
        entries.append(
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": _digest(image.manifest),
                "size": len(image.manifest),
                "annotations": {REFERENCE: reference},
            }
        )
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}, indent=1))


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
