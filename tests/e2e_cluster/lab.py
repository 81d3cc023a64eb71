"""A cluster of two nodes on this machine, and what stands beside a cluster: a registry, DNS, an S3 server.

The session fixture of `conftest.py` opens one `Lab`. It is used inside the namespaces that `__main__.py` makes: the
lab has a network of its own with no way out, so that addresses need not be looked for and nothing outside can be
touched.

    lab 10.123.0.1: etcd, API server, scheduler, controller manager, CoreDNS, registry, versitygw
     '- bridge -+- node-1 10.123.0.11: kubelet, containerd, kube-proxy; pods 10.124.1.0/24
                '- node-2 10.123.0.12: the same;                        pods 10.124.2.0/24
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tests.cluster.binaries import program
from tests.e2e_cluster.daemons import Daemon, wait_until
from tests.e2e_cluster.images import PAUSE_IMAGE, clone_containerd
from tests.e2e_cluster.node import Node, NodeSpec, make_cgroup, remove_cgroups, shell
from tests.e2e_cluster.registry import serve_images

BRIDGE = "lab"
ADDRESS = "10.123.0.1"
NODES = {"node-1": ("10.123.0.11", "10.124.1.0/24"), "node-2": ("10.123.0.12", "10.124.2.0/24")}
CLUSTER_SUBNET = "10.124.0.0/16"
SERVICE_SUBNET = "10.96.0.0/16"
API_SERVER = f"https://{ADDRESS}:6443"
ETCD = "http://127.0.0.1:2379"
REGISTRY_PORT = 5000
S3 = f"http://{ADDRESS}:7070"
S3_ACCESS, S3_SECRET, S3_REGION = "lab", "lab-secret", "us-east-1"
START_SECONDS = 120.0
LOGS_VARIABLE = "QLORA_E2E_LOGS"
"""A folder that gets the logs of everything at the end."""

USERS = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "dns": ("lab:dns", "system:masters"),
    "proxy": ("system:kube-proxy", ""),
    **{name: (f"system:node:{name}", "system:nodes") for name in NODES},
}
"""Account -> (user, group) of whoever speaks to the API server; its token is its own name."""


@dataclass(slots=True, kw_only=True)
class Lab:
    """The running cluster."""

    folder: Path
    daemons: dict[str, Daemon] = field(default_factory=dict[str, Daemon])
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.folder / "admin.kubeconfig"

    @property
    def buckets(self) -> Path:
        """The S3 server's disk."""
        return self.folder / "buckets"

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 120) -> str:
        """What a kubectl command prints; fails with what it says."""
        command = [str(program("kubectl")), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ARGUMENTS`, as JSON."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, *documents: Mapping[str, object], namespace: str = "default") -> None:
        """`kubectl apply` the documents."""
        listed = {"apiVersion": "v1", "kind": "List", "items": documents}
        self.kubectl("apply", "--namespace", namespace, "--filename=-", stdin=json.dumps(listed))

    def make_namespace(self, name: str) -> None:
        """A namespace with Pod Security `restricted` enforced, ready for pods."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        self.kubectl("wait", "serviceaccount/default", "--for=create", f"--namespace={name}", "--timeout=60s")

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Daemon:
        """Start one of the lab's own programs."""
        daemon = Daemon(name, command, self.folder / "log" / f"{name}.log", environment)
        self.daemons[name] = daemon
        return daemon


@contextmanager
def open_lab(cache: Path) -> Generator[Lab]:
    """A cluster whose nodes are ready; gone at the end."""
    remove_cgroups()
    runs = cache / "runs"
    shutil.rmtree(runs, ignore_errors=True)  # of a run that was killed; its processes and mounts died with it
    folder = runs / "run"
    folder.mkdir(parents=True)
    lab = Lab(folder=folder)
    with ExitStack() as stack:
        stack.callback(_close, lab)
        _make_network()
        _write_accounts(lab)
        _start_control_plane(lab)
        stack.enter_context(serve_images(cache, ADDRESS, REGISTRY_PORT))
        for name in NODES:
            clone_containerd(cache, folder / name / "containerd")
            lab.nodes[name] = _start_node(lab, name)
        _start_dns(lab)
        _start_s3(lab)
        _wait_for_nodes(lab)
        yield lab


def _close(lab: Lab) -> None:
    for node in lab.nodes.values():
        node.stop()
    for daemon in reversed(lab.daemons.values()):
        daemon.kill()  # there is nothing to save
    if keep := os.environ.get(LOGS_VARIABLE):
        _keep_logs(lab.folder, Path(keep))
    shutil.rmtree(lab.folder, ignore_errors=True)
    remove_cgroups()


def _keep_logs(folder: Path, target: Path) -> None:
    """The logs of all programs and pods, for whoever looks into a failure."""
    for log in (*folder.glob("log"), *folder.glob("*/log")):
        # Pods' logs are also listed as links into the nodes' own file trees.
        shutil.copytree(log, target / log.relative_to(folder), symlinks=True, dirs_exist_ok=True)


def _make_network() -> None:
    shell("ip link set lo up")
    shell(f"ip link add {BRIDGE} type bridge")
    shell(f"ip address add {ADDRESS}/24 dev {BRIDGE}")
    shell(f"ip link set {BRIDGE} up")
    # Tests reach Services as a pod does: through the kube-proxy of a node.
    shell(f"ip route add {SERVICE_SUBNET} via {NODES['node-1'][0]}")


def _write_accounts(lab: Lab) -> None:
    lines = [f'{account},{user},{account},"{group}"' for account, (user, group) in USERS.items()]
    (lab.folder / "tokens.csv").write_text("\n".join(lines) + "\n")
    for account in USERS:
        certificate = str(lab.folder / "apiserver" / "apiserver.crt")
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {"server": API_SERVER, "certificate-authority": certificate}}],
            "users": [{"name": account, "user": {"token": account}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": account}}],
            "current-context": "lab",
        }
        (lab.folder / f"{account}.kubeconfig").write_text(json.dumps(document))
    shell(f"openssl genrsa -out {lab.folder}/service-accounts.key 2048")
    # With this certificate the API server asks kubelets for logs; it is its own authority.
    shell(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /O=system:masters/CN=api-server "
        f"-keyout {lab.folder}/kubelet-client.key -out {lab.folder}/kubelet-client.crt"
    )


def _start_control_plane(lab: Lab) -> None:
    folder = lab.folder
    data = [f"--data-dir={folder}/etcd", "--unsafe-no-fsync"]
    etcd = lab.start(
        "etcd", [program("etcd"), *data, f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}"]
    )
    wait_until("etcd answers", lambda: _answers(f"{ETCD}/health"), START_SECONDS, etcd)
    keys = f"{folder}/service-accounts.key"
    api_server = lab.start(
        "kube-apiserver",
        [
            program("kube-apiserver"),
            f"--etcd-servers={ETCD}",
            f"--advertise-address={ADDRESS}",
            "--secure-port=6443",
            f"--cert-dir={folder}/apiserver",
            f"--token-auth-file={folder}/tokens.csv",
            f"--service-cluster-ip-range={SERVICE_SUBNET}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={keys}",
            f"--service-account-key-file={keys}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--kubelet-client-certificate={folder}/kubelet-client.crt",
            f"--kubelet-client-key={folder}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",
        ],
    )
    wait_until("the API server is ready", lambda: _is_ready(lab), START_SECONDS, api_server)
    lab.start(
        "kube-scheduler",
        [program("kube-scheduler"), f"--kubeconfig={folder}/scheduler.kubeconfig", *_trusting(folder, "scheduler")],
    )
    lab.start(
        "kube-controller-manager",
        [
            program("kube-controller-manager"),
            f"--kubeconfig={folder}/controller-manager.kubeconfig",
            f"--service-account-private-key-file={keys}",
            f"--root-ca-file={folder}/apiserver/apiserver.crt",
            "--use-service-account-credentials",
            "--node-monitor-grace-period=20s",
            *_trusting(folder, "controller-manager"),
        ],
    )


def _trusting(folder: Path, account: str) -> list[str]:
    authentication = [
        f"--{name}-kubeconfig={folder}/{account}.kubeconfig" for name in ("authentication", "authorization")
    ]
    return [*authentication, "--authentication-skip-lookup", "--leader-elect=false"]


def _start_node(lab: Lab, name: str) -> Node:
    address, subnet = NODES[name]
    others = [(other_subnet, other) for node, (other, other_subnet) in NODES.items() if node != name]
    spec = NodeSpec(
        name=name,
        address=address,
        gateway=ADDRESS,
        pod_subnet=subnet,
        routes=tuple(others),
        cluster_subnet=CLUSTER_SUBNET,
        folder=str(lab.folder / name),
        kubeconfig=str(lab.folder / f"{name}.kubeconfig"),
        proxy_kubeconfig=str(lab.folder / "proxy.kubeconfig"),
        client_authority=str(lab.folder / "kubelet-client.crt"),
        kubelet=str(program("kubelet")),
        kube_proxy=str(program("kube-proxy")),
        pause_image=PAUSE_IMAGE,
        registry=f"http://{ADDRESS}:{REGISTRY_PORT}",
    )
    make_cgroup(spec.cgroup)
    node = Node(spec, BRIDGE)
    lab.daemons[name] = node.daemon
    return node


def _start_dns(lab: Lab) -> None:
    configuration = f"""
cluster.local:53 {{
    bind {ADDRESS}
    errors
    kubernetes {{
        kubeconfig {lab.folder}/dns.kubeconfig
    }}
}}
.:53 {{
    bind {ADDRESS}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
    file = lab.folder / "Corefile"
    file.write_text(configuration)
    lab.start("coredns", [program("coredns"), "-conf", file])


def _start_s3(lab: Lab) -> None:
    """A server of the S3 protocol; its buckets are the folders in `lab.buckets`, its objects the files in them."""
    lab.buckets.mkdir()
    sidecar = lab.folder / "s3-metadata"  # not every file system keeps extended attributes
    sidecar.mkdir()
    account = [f"--access={S3_ACCESS}", f"--secret={S3_SECRET}", f"--region={S3_REGION}"]
    where = [f"--port={ADDRESS}:7070", "posix", f"--sidecar={sidecar}", lab.buckets]
    server = lab.start("versitygw", [program("versitygw"), *account, *where])
    wait_until("the S3 server answers", lambda: _listens(7070), START_SECONDS, server)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((ADDRESS, port), timeout=5):
        return True
    return False


def _wait_for_nodes(lab: Lab) -> None:
    def ready() -> bool:
        nodes = json.loads(lab.kubectl("get", "nodes", "--output=json"))["items"]
        conditions = [condition for node in nodes for condition in node["status"]["conditions"]]
        return [condition["status"] for condition in conditions if condition["type"] == "Ready"] == ["True"] * len(
            NODES
        )

    wait_until("both nodes are ready", ready, START_SECONDS, *lab.daemons.values())


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except (URLError, OSError):
        return False


def _is_ready(lab: Lab) -> bool:
    try:
        return lab.kubectl("get", "--raw=/readyz", seconds=5) == "ok"
    except (AssertionError, subprocess.TimeoutExpired):
        return False
