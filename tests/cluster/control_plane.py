"""A Kubernetes control plane of this very test run: etcd and kube-apiserver, and what else is asked for.

Test fixtures call `control_plane`. Everything listens on 127.0.0.1 at ports that were free, keeps its data in the
folder that it is given, and is gone when the context ends. Programs come from `binaries`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from orchestrator.adapters.kubernetes.api import KubeApi
from orchestrator.errors import OrchestratorError
from tests.cluster.binaries import program

START_SECONDS = 120.0
STOP_SECONDS = 20.0
SERVICE_RANGE = "10.0.0.0/24"
CONTEXT = "test"
KWOK_LABEL = "kwok.x-k8s.io/node=fake"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """Where it is, and who may do everything there."""

    folder: Path
    url: str
    token: str
    kubeconfig: Path
    accounts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Tokens of further administrators, by name, so that what each of them asks for can be told apart."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict[str, "subprocess.Popen[bytes]"])

    def api(self) -> KubeApi:
        """A connection as administrator."""
        return KubeApi(kubeconfig=str(self.kubeconfig))

    def kubeconfig_for(self, token: str, *, url: str = "", name: str = "user") -> Path:
        """A kubeconfig with another token, or through another address, such as a proxy's."""
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(_kubeconfig(url or self.url, token, self.folder / "certificates/apiserver.crt")))
        return path

    def tail(self, name: str, lines: int = 20) -> str:
        """The end of a program's log."""
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def control_plane(
    folder: Path,
    *parts: str,
    accounts: Sequence[str] = (),
    arguments: Mapping[str, Sequence[str]] | None = None,
) -> Generator[ControlPlane]:
    """Up and answering; `parts` are any of kube-scheduler, kube-controller-manager and kwok.

    `accounts` are names of further administrators; `arguments` are added to a program's command line.
    """
    more = arguments or {}
    folder.mkdir(parents=True, exist_ok=True)
    etcd_port, peer_port, api_port, kwok_port = free_ports(4)
    plane = ControlPlane(
        folder=folder,
        url=f"https://127.0.0.1:{api_port}",
        token=secrets.token_hex(16),
        kubeconfig=folder / "admin.kubeconfig",
        accounts={name: secrets.token_hex(16) for name in accounts},
    )
    key = _signing_key(folder)
    with ExitStack() as stack:
        _start(stack, plane, "etcd", _etcd(folder, etcd_port, peer_port))
        _start(
            stack,
            plane,
            "kube-apiserver",
            [*_apiserver(plane, key, etcd_port, api_port), *more.get("kube-apiserver", ())],
        )
        _wait(plane, "kube-apiserver", (folder / "certificates/apiserver.crt").is_file)
        plane.kubeconfig_for(plane.token, name="admin")
        api = plane.api()
        _wait(plane, "kube-apiserver", lambda: _is_ready(api))
        commands = {
            "kube-scheduler": ["--leader-elect=false", "--secure-port=0"],
            "kube-controller-manager": [
                "--leader-elect=false",
                "--secure-port=0",
                f"--service-account-private-key-file={key}",
                f"--root-ca-file={folder / 'certificates/apiserver.crt'}",
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
            ],
            "kwok": [
                f"--manage-nodes-with-label-selector={KWOK_LABEL}",
                f"--server-address=127.0.0.1:{kwok_port}",
                *([f"--config={folder / 'kwok.yaml'}"] if (folder / "kwok.yaml").is_file() else []),
            ],
        }
        for name in parts:
            _start(stack, plane, name, [f"--kubeconfig={plane.kubeconfig}", *commands[name], *more.get(name, ())])
        if "kube-controller-manager" in parts:
            _wait(plane, "kube-controller-manager", lambda: _has_service_account(api))
        yield plane


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _etcd(folder: Path, port: int, peer_port: int) -> list[str]:
    url, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",  # nothing outlives the run
    ]


def _apiserver(plane: ControlPlane, key: Path, etcd_port: int, port: int) -> list[str]:
    tokens = plane.folder / "tokens.csv"
    names = {"admin": plane.token, **plane.accounts}
    tokens.write_text("".join(f'{token},{name},{name},"system:masters"\n' for name, token in names.items()))
    return [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={plane.folder / 'certificates'}",
        f"--token-auth-file={tokens}",
        "--authorization-mode=Node,RBAC",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--service-account-issuer={plane.url}",
        f"--service-account-signing-key-file={key}",
        f"--service-account-key-file={key}",
        "--allow-privileged=true",
        "--profiling=false",
        # Without a controller manager nobody makes accounts; the tests that are about them run one.
        "--disable-admission-plugins=ServiceAccount",
    ]


def _signing_key(folder: Path) -> Path:
    path = folder / "service-accounts.pem"
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def _kubeconfig(url: str, token: str, authority: Path) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": CONTEXT, "cluster": {"server": url, "certificate-authority": str(authority)}}],
        "users": [{"name": CONTEXT, "user": {"token": token}}],
        "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": CONTEXT}}],
        "current-context": CONTEXT,
    }


def _start(stack: ExitStack, plane: ControlPlane, name: str, arguments: Sequence[str]) -> None:
    path = program(name)
    log = stack.enter_context((plane.folder / f"{name}.log").open("ab"))
    process = subprocess.Popen([str(path), *arguments], stdout=log, stderr=log, cwd=plane.folder)
    plane.processes[name] = process
    stack.callback(stop_process, process, STOP_SECONDS)


def stop_process(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask it to end, and kill it after so long."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(plane: ControlPlane, name: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not done():
        if plane.processes[name].poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{name} did not come up (pid of the tests: {os.getpid()}):\n{plane.tail(name)}")
        time.sleep(0.05)


def _is_ready(api: KubeApi) -> bool:
    """The priority classes of the system are made after the server listens, and the namespaces after those."""
    try:
        api.get("/apis/scheduling.k8s.io/v1/priorityclasses/system-node-critical")
        api.get("/api/v1/namespaces/default")
    except OrchestratorError:
        return False
    return True


def _has_service_account(api: KubeApi) -> bool:
    try:
        api.get("/api/v1/namespaces/default/serviceaccounts/default")
    except OrchestratorError:
        return False
    return True
