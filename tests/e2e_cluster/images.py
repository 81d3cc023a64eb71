"""Images for the nodes: built from the project's Dockerfiles, without a registry to start from, once per content.

`__main__.py` calls `provide_images` before the lab's network closes; nodes then start with a copy of a containerd that
has pulled everything. What is kept, all in one cache folder outside the checkout:

    base.tar        a Debian with Python by debootstrap, which stands in for what the Dockerfiles' FROM names
    buildah/        its layers: after a change of our sources only the thin last layers are built anew
    images/         manifests and configurations, for `registry.py` to serve
    containerd/     the root of a containerd that has unpacked them, by hard links to buildah's (`layers.py`); a node's
                    own root is again a tree of hard links, and a copy of the databases, made in seconds

Everything that mounts runs in a mount and process namespace of its own: an interruption leaves nothing mounted.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.e2e_cluster.layers import share_images
from tests.e2e_cluster.registry import LAYOUT_FOLDER

CHECKOUT = Path(__file__).parents[2]
CHART = CHECKOUT / "helm" / "qlora-orchestrator"
DEBIAN = "bookworm"
DEBIAN_PACKAGES = ("ca-certificates", "python3", "python3-venv")
SOURCES = (
    "orchestrator",
    "trainer_image",
    "controller_image",
    "requirements",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
"""What images are built from."""
BASE = "localhost/base:lab"
PAUSE_IMAGE = "lab/pause:1"
BUILD_SECONDS = 1800.0
CERTIFICATES = Path("/etc/ssl/certs")
UV = Path(sys.executable).with_name("uv")
UV_CACHE = "/var/cache/uv"
"""Where a build sees the cache of this machine's uv."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image of the project."""

    name: str
    dockerfile: str

    @property
    def reference(self) -> str:
        """The name and tag that the chart asks for by default."""
        version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
        return f"{self.name}:{version}"


TRAINER = Image(name="qlora-orchestrator/trainer", dockerfile="trainer_image/Dockerfile")
CONTROLLER = Image(name="qlora-orchestrator/controller", dockerfile="controller_image/Dockerfile")
IMAGES = (TRAINER, CONTROLLER)


def provide_images(cache: Path) -> None:
    """See to it that the cache holds the images of the present sources."""
    stamp = cache / "images.stamp"
    digest = _digest_of_sources()
    if stamp.exists() and stamp.read_text() == digest:
        return
    stamp.unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    _provide_base(cache)
    for image in IMAGES:
        _build(cache, image)
    names = {BASE: PAUSE_IMAGE, **{f"localhost/{image.reference}": image.reference for image in IMAGES}}
    share_images(cache / "buildah", cache / "containerd", cache / LAYOUT_FOLDER, names)
    stamp.write_text(digest)


def clone_containerd(cache: Path, target: Path) -> None:
    """A containerd's root for one node: hard links to immutable files, and databases of its own."""
    target.mkdir(parents=True, exist_ok=True)
    _run(["cp", "--archive", "--link", f"{cache}/containerd/.", str(target)], seconds=120)
    for database in target.rglob("*.db"):
        if database.parent.parent == target:
            database.unlink()
            shutil.copyfile(cache / "containerd" / database.relative_to(target), database)


def _digest_of_sources() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in SOURCES:
        top = CHECKOUT / name
        for file in sorted(top.rglob("*") if top.is_dir() else [top]):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(CHECKOUT)}\0{file.stat().st_mode}\0".encode() + file.read_bytes())
    digest.update(TRAINER.reference.encode())
    return digest.hexdigest()


def _provide_base(cache: Path) -> None:
    """The image that stands in for every public one."""
    archive = cache / f"base-{hashlib.sha256(repr((DEBIAN, DEBIAN_PACKAGES)).encode()).hexdigest()[:12]}.tar"
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            root = Path(folder) / "root"
            _run(
                _isolated(["debootstrap", "--variant=minbase", f"--include={','.join(DEBIAN_PACKAGES)}", DEBIAN, root])
            )
            (root / "usr/bin/python").symlink_to("python3")
            _run(["tar", "--create", "--file", f"{folder}/base.tar", "--directory", str(root), "."])
            Path(folder, "base.tar").rename(archive)
    with tempfile.TemporaryDirectory() as folder:
        os.link(archive, Path(folder) / "base.tar") if _same_disk(archive, Path(folder)) else shutil.copy(
            archive, Path(folder) / "base.tar"
        )
        file = Path(folder) / "Dockerfile"
        file.write_text('FROM scratch\nADD base.tar /\nCMD ["sleep", "infinity"]\n')
        _buildah(cache, "build", "--layers", "--isolation=chroot", f"--tag={BASE}", f"--file={file}", folder)


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _build(cache: Path, image: Image) -> None:
    """Build one Dockerfile; our base carries the name of the public one that it starts from."""
    dockerfile = CHECKOUT / image.dockerfile
    for name in _public_bases(dockerfile.read_text()):
        _buildah(cache, "tag", BASE, name)
    with _package_settings() as mounts:
        _buildah(
            cache,
            "build",
            "--layers",
            "--isolation=chroot",
            "--network=host",
            "--pull=never",
            *mounts,
            f"--tag=localhost/{image.reference}",
            f"--file={dockerfile}",
            str(CHECKOUT),
        )


def _public_bases(dockerfile: str) -> list[str]:
    """The images that a Dockerfile starts from and does not build itself."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", dockerfile, re.MULTILINE))
    stages: set[str] = set()
    bases: list[str] = []
    pattern = r"^FROM (?:--\S+ )*(\S+)(?: AS (\S+))?|^COPY --from=(\S+)"
    for base, stage, source in re.findall(pattern, dockerfile, re.MULTILINE | re.IGNORECASE):
        name = re.sub(r"\$\{?(\w+)\}?", lambda match: defaults.get(match[1], ""), base or source)
        if name not in stages and name != "scratch" and name not in bases:
            bases.append(name)
        if stage:
            stages.add(stage)
    return bases


@contextmanager
def _package_settings() -> Generator[list[str]]:
    """Mounts with which pip and uv in the build find packages as this machine's do; nothing of them stays in the image.

    uv also takes from this machine's cache what `make` has fetched already for the tests: some gigabytes.
    """
    with tempfile.TemporaryDirectory() as name:
        pip, uv = Path(name) / "pip.conf", Path(name) / "uv.toml"
        _write_pip_settings(pip)
        uv.write_text(f'cache-dir = "{UV_CACHE}"\nnative-tls = true\n' + _indexes())
        read_only = {str(pip): "/etc/pip.conf", str(uv): "/etc/uv/uv.toml"}
        if CERTIFICATES.exists():
            read_only[str(CERTIFICATES)] = str(CERTIFICATES)
        yield [
            f"--volume={_uv_cache()}:{UV_CACHE}",
            *(f"--volume={source}:{target}:ro" for source, target in read_only.items()),
        ]


def _write_pip_settings(file: Path) -> None:
    settings = ConfigParser(interpolation=None)
    settings.read("/etc/pip.conf")
    of_environment = {
        name[4:].lower().replace("_", "-"): value for name, value in os.environ.items() if name.startswith("PIP_")
    }
    known = dict(settings["global"]) if settings.has_section("global") else {}
    settings["global"] = {**known, **of_environment}
    with file.open("w") as target:
        settings.write(target)


def _indexes() -> str:
    """The package index that this machine's uv was told to use, if any."""
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    return f'index-url = "{index}"\n' if index else ""


def _uv_cache() -> Path:
    found = subprocess.run([UV, "cache", "dir"], capture_output=True, text=True, check=True, timeout=60)
    cache = Path(found.stdout.strip())
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _buildah(cache: Path, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as state:
        storage = [f"--root={cache}/buildah", f"--runroot={state}", "--storage-driver=overlay"]
        _run(_isolated(["buildah", *storage, *arguments]))


def _isolated(command: Sequence[str | Path]) -> list[str]:
    """The command in namespaces of its own for mounts and processes, which end with it."""
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *(str(part) for part in command)]


def _run(command: Sequence[str], *, seconds: float = BUILD_SECONDS) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:12])}... ended with {done.returncode}:\n{done.stdout[-4000:]}")
