"""`python -m tests.e2e_cluster [pytest's arguments]`: the tier on a real cluster, from nothing to its verdict.

Three steps. What needs the network comes first: Debian packages, Kubernetes' programs, images. Then pytest is started
in a network, mount and process namespace of its own, as the first process there: whatever it starts dies with it,
however it ends, and nothing in there can reach an address outside this machine.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster.binaries import BuildError, MissingProgramError, program
from tests.e2e_cluster import CACHE_VARIABLE, machine
from tests.e2e_cluster.images import provide_images

PROGRAMS = (
    "etcd",
    "kube-apiserver",
    "kube-scheduler",
    "kube-controller-manager",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "coredns",
    "helm",
    "versitygw",
)
FOLDER = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """The exit code of pytest; 0 where the tier cannot run here, 1 if CI asked for it."""
    if (problem := machine.lacking()) is not None:
        return _skip(problem)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-orchestrator" / "e2e"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one cluster at a time; held until the tests have ended
        try:
            _provide(cache)
        except (MissingProgramError, BuildError) as error:
            return _skip(str(error))
        return _test(arguments, cache)


def _provide(cache: Path) -> None:
    """Programs and images at the same time: compilers compute while packages come over the network."""
    with ThreadPoolExecutor() as pool:
        programs = pool.submit(_timed, "programs", lambda: [program(name) for name in PROGRAMS])
        images = pool.submit(_timed, "images", lambda: provide_images(cache))
        programs.result()
        images.result()


def _test(arguments: list[str], cache: Path) -> int:
    namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    # The cache stays off: it would be written into the checkout by root.
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or [str(FOLDER)])]
    return subprocess.run([*namespaces, *pytest], env={**os.environ, CACHE_VARIABLE: str(cache)}).returncode


def _skip(problem: str) -> int:
    print(f"the end-to-end tier on a cluster is skipped: it needs {problem}", file=sys.stderr)
    return 1 if os.environ.get("CI") == "true" else 0


def _timed(what: str, step: Callable[[], object]) -> None:
    started = time.monotonic()
    step()
    print(f"{what} ready in {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
