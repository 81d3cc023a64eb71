"""A node: a kubelet, a containerd and a kube-proxy in namespaces of their own, as on a machine of their own.

`Lab` starts a node with `Node`, from outside; `python -m tests.e2e_cluster.node SPEC` is then the node's first process,
inside. A node has its own network (one leg on the lab's bridge), process, mount and host name namespaces, and its own
cgroup below `/qlora-e2e`, so that a killed node takes all its pods with it, as a power cut does, and nothing of it
stays on the machine but empty cgroups, which the next start removes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.e2e_cluster.daemons import Daemon, wait_until

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_PARENT = "qlora-e2e"
CNI_PROGRAMS = "/usr/lib/cni"  # Debian's place
BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
RUN = Path("/run")
"""Private to the node: a tmpfs of its own."""
SOCKET = RUN / "containerd/containerd.sock"
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """What a node is told when it starts."""

    name: str
    address: str
    """The node's address on the lab's bridge."""
    gateway: str
    """The lab's own address: API server, DNS and registry are there."""
    pod_subnet: str
    routes: tuple[tuple[str, str], ...]
    """Other nodes' pods: (subnet, address)."""
    cluster_subnet: str
    folder: str
    """Its disk: containerd's root, the kubelet's root, logs."""
    kubeconfig: str
    proxy_kubeconfig: str
    client_authority: str
    """Certificate of who may ask the kubelet for logs."""
    kubelet: str
    kube_proxy: str
    pause_image: str
    registry: str

    @property
    def cgroup(self) -> str:
        """The cgroup of all its pods."""
        return f"{CGROUP_PARENT}/{self.name}"


class Node:
    """A node as the lab sees it."""

    def __init__(self, spec: NodeSpec, bridge: str) -> None:
        self.spec = spec
        folder = Path(spec.folder)
        for name in ("containerd", "kubelet", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        make_cgroup(spec.cgroup)
        file = folder / "node.json"
        file.write_text(json.dumps(asdict(spec)))
        namespaces = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
        command = ["unshare", *namespaces, sys.executable, "-m", "tests.e2e_cluster.node", str(file)]
        self.daemon = Daemon(spec.name, command, folder / "log" / "node.log")
        self._plug_in(bridge)

    def _plug_in(self, bridge: str) -> None:
        """Give the node its network card; it waits for that."""
        children = Path(f"/proc/{self.daemon.process.pid}/task/{self.daemon.process.pid}/children")
        wait_until("its first process", lambda: children.read_text().strip(), START_SECONDS, self.daemon)
        card = f"to-{self.spec.name}"
        pid = children.read_text().strip()
        shell(f"ip link add {card} type veth peer name eth0 netns {pid}")
        shell(f"ip link set {card} master {bridge} up")
        shell(f"ip route replace {self.spec.pod_subnet} via {self.spec.address}")

    def log(self, name: str) -> str:
        """What one of its programs has logged."""
        return (Path(self.spec.folder) / "log" / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        """Cut its power: the first process ends, and everything in the node with it."""
        self.daemon.kill()


def shell(command: str) -> str:
    """Run a command line of plain words; fails with what it said."""
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{command}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def cgroup_hierarchies() -> list[Path]:
    """Where cgroups are: one tree (version 2), or one for every controller (version 1)."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def make_cgroup(name: str) -> None:
    """The cgroup `name` and its parents, in every hierarchy, with what the kubelet expects of its root."""
    for hierarchy in cgroup_hierarchies():
        for part in reversed(Path(name).parents[:-1]):
            _make_one(hierarchy / part)
        _make_one(hierarchy / name)


def _make_one(folder: Path) -> None:
    parent = folder.parent
    folder.mkdir(exist_ok=True)
    # Version 1 gives a new cpuset no processors; version 2 gives a new cgroup no controllers.
    for file in ("cpuset.cpus", "cpuset.mems"):
        if (parent / "tasks").exists() and (folder / file).exists() and not (folder / file).read_text().strip():
            (folder / file).write_text((parent / file).read_text())
    if (parent / "cgroup.subtree_control").exists() and (available := parent / "cgroup.controllers").exists():
        for controller in available.read_text().split():
            with suppress(OSError):
                (parent / "cgroup.subtree_control").write_text(f"+{controller}")


def remove_cgroups() -> None:
    """Remove what nodes of earlier runs left; their processes are gone."""
    for hierarchy in cgroup_hierarchies():
        top = hierarchy / CGROUP_PARENT
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):  # still in use: by a run that is going on
                Path(folder).rmdir()


# --- inside the node


def main(spec: NodeSpec) -> int:
    """The node's first process: set the machine up, start the programs, end when one of them ends."""
    signal.signal(signal.SIGTERM, _end)
    folder = Path(spec.folder)
    _mount(folder)
    _join_network(spec)
    _write_configuration(spec)
    log = folder / "log"
    containerd = Daemon("containerd", ["containerd", "--config", RUN / "containerd.toml"], log / "containerd.log")
    wait_until("containerd's socket", SOCKET.exists, START_SECONDS, containerd)
    proxy = Daemon("kube-proxy", _proxy_command(spec), log / "kube-proxy.log")
    kubelet = Daemon("kubelet", _kubelet_command(spec), log / "kubelet.log")
    return _reap({daemon.process.pid: daemon for daemon in (containerd, proxy, kubelet)})


def _reap(programs: dict[int, Daemon]) -> int:
    """Wait for orphans, as a first process must; a program of the node that ends, ends the node."""
    while True:
        pid, status = os.wait()
        if (daemon := programs.get(pid)) is not None:
            print(f"{daemon.name} ended with {os.waitstatus_to_exitcode(status)}:\n{daemon.tail()}", file=sys.stderr)
            return 1


def _mount(folder: Path) -> None:
    shell("mount --make-rshared /")
    shell(f"mount -t tmpfs -o mode=755 tmpfs {RUN}")
    for source, target in (("containerd", "/var/lib/containerd"), ("kubelet", "/var/lib/kubelet"), ("log", "/var/log")):
        Path(target).mkdir(parents=True, exist_ok=True)
        shell(f"mount --bind {folder / source} {target}")
    shell("mount --make-rshared /var/lib/kubelet")


def _join_network(spec: NodeSpec) -> None:
    shell(f"hostname {spec.name}")
    wait_until("the network card", lambda: "eth0:" in Path("/proc/net/dev").read_text(), START_SECONDS)
    shell("ip link set lo up")
    shell(f"ip address add {spec.address}/24 dev eth0")
    shell("ip link set eth0 up")
    shell(f"ip route add default via {spec.gateway}")
    for subnet, address in spec.routes:
        shell(f"ip route add {subnet} via {address}")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    # So that the answer of a Service's pod to its neighbor on the same bridge finds its way back.
    BRIDGE_FILTER.write_text("1")


def _write_configuration(spec: NodeSpec) -> None:
    for name, content in (
        ("containerd.toml", _containerd_configuration(spec)),
        ("registry/_default/hosts.toml", _registry_configuration(spec)),
        ("cni/10-lab.conflist", json.dumps(_cni_configuration(spec))),
        ("kubelet.json", json.dumps(_kubelet_configuration(spec))),
        ("resolv.conf", f"nameserver {spec.gateway}\n"),
    ):
        file = RUN / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def _containerd_configuration(spec: NodeSpec) -> str:
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE no sandbox starts otherwise.
    return f"""
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{spec.pause_image}"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{CNI_PROGRAMS}"
  conf_dir = "{RUN}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{RUN}/registry"
"""


def _registry_configuration(spec: NodeSpec) -> str:
    """Every image, whatever registry its name means, comes from the lab's."""
    return f'server = "{spec.registry}"\n[host."{spec.registry}"]\n  capabilities = ["pull", "resolve"]\n'


def _cni_configuration(spec: NodeSpec) -> dict[str, Any]:
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": spec.pod_subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": f"{RUN}/cni-addresses",
        },
    }
    return {"cniVersion": "0.4.0", "name": "lab", "plugins": [bridge]}


def _kubelet_configuration(spec: NodeSpec) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": spec.client_authority},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{spec.cgroup}",
        "clusterDNS": [spec.gateway],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        # The machine's disk and memory are shared with whatever else runs on it: no reason to evict our pods.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "failCgroupV1": False,
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "oomScoreAdj": 0,
        "podLogsDir": "/var/log/pods",
        "resolvConf": f"{RUN}/resolv.conf",
        "serializeImagePulls": True,
        "syncFrequency": "10s",
    }


def _end(*_: object) -> None:
    """SIGTERM's handler."""
    sys.exit(0)


def _kubelet_command(spec: NodeSpec) -> list[str]:
    return [
        spec.kubelet,
        f"--config={RUN}/kubelet.json",
        f"--kubeconfig={spec.kubeconfig}",
        f"--hostname-override={spec.name}",
        f"--node-ip={spec.address}",
    ]


def _proxy_command(spec: NodeSpec) -> list[str]:
    return [
        spec.kube_proxy,
        f"--kubeconfig={spec.proxy_kubeconfig}",
        f"--hostname-override={spec.name}",
        f"--cluster-cidr={spec.cluster_subnet}",
        "--proxy-mode=iptables",
        "--conntrack-max-per-core=0",
        "--oom-score-adj=0",
    ]


if __name__ == "__main__":
    document: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    document["routes"] = tuple(tuple(route) for route in document["routes"])
    sys.exit(main(NodeSpec(**document)))
