"""What the tier needs of the machine: Linux, root, a few Debian packages. `__main__.py` asks before anything starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "buildah": "buildah",
    "containerd": "containerd",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "openssl": "openssl",
    "unshare": "util-linux",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
"""Program -> Debian package."""
BRIDGE_FILTER = Path("/proc/sys/net/bridge")
INSTALL_SECONDS = 600.0


def lacking() -> str | None:
    """What keeps the tier from running here, in one line; None when nothing does. Installs Debian packages as root."""
    if sys.platform != "linux":
        return "a Linux machine"
    if os.geteuid() != 0:
        return "root (it starts a kubelet and a containerd in namespaces of their own)"
    if missing := _missing_packages():
        if shutil.which("apt-get") is None:
            return f"the programs of the Debian packages {', '.join(missing)}"
        if problem := _install(missing):
            return problem
    if not BRIDGE_FILTER.exists():
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True)
    if not BRIDGE_FILTER.exists():
        return "the kernel's bridge netfilter (modprobe br_netfilter)"
    return None


def _missing_packages() -> list[str]:
    return sorted({package for name, package in PACKAGES.items() if shutil.which(name) is None})


def _install(packages: list[str]) -> str | None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        if done.returncode:
            return f"the Debian packages {', '.join(packages)}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    # Debian starts a containerd for the whole machine; the nodes have their own.
    subprocess.run(["systemctl", "disable", "--now", "containerd"], capture_output=True)
    return None
