"""The controller's process and the registry on paper, and what can be read of them from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.control_plane import CONTEXT, ControlPlane, free_ports, stop_process

ACCOUNT = "controller"
START_SECONDS = 120.0
STOP_SECONDS = 60.0
SETTINGS = {
    "QLORA_NAMESPACE": "default",
    "QLORA_POD_NAME": "controller-0",
    "QLORA_STORE_URI": "s3://adapters/jobs",
    "QLORA_TRAINER_IMAGE": "trainer:1",
    "QLORA_CPU_STAGES_LIMIT": "1000",  # a publish stage for every GPU: training takes seconds here
}
"""All others are the defaults."""
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata", "users": [ACCOUNT]}, {"level": "None"}],
}


def audit_arguments(folder: Path) -> list[str]:
    """Makes the API server write down every request of the controller's account."""
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "audit-policy.json"
    policy.write_text(json.dumps(AUDIT_POLICY))
    return [f"--audit-policy-file={policy}", f"--audit-log-path={folder / 'audit.log'}", "--audit-log-mode=blocking"]


def audited_requests(folder: Path) -> Counter[tuple[str, str]]:
    """The controller's requests so far by namespace and `verb resource`, as the API server counts them."""
    requests: Counter[tuple[str, str]] = Counter()
    with (folder / "audit.log").open() as log:
        for line in log:
            entry = json.loads(line)
            found: Mapping[str, str] = entry.get("objectRef", {})
            names = (found.get("resource", ""), found.get("subresource", ""))
            what = f"{entry['verb']} {'/'.join(name for name in names if name)}"
            requests[found.get("namespace", ""), what] += 1
    return requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A controller that leads."""

    process: subprocess.Popen[bytes]
    metrics_port: int
    registry_port: int
    log: Path

    def peak_mib(self) -> float:
        """The most resident memory so far."""
        return peak_mib(self.process.pid)

    def cpu_seconds(self) -> float:
        """Spent so far."""
        return cpu_seconds(self.process.pid)

    def samples(self) -> dict[str, float]:
        """Its metrics, by name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return {
            " ".join([sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def peak_mib(pid: int) -> float:
    """The most resident memory of a process so far, by the kernel's account."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the kernel tells no VmHWM")


def cpu_seconds(pid: int) -> float:
    """Spent by a process so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def registry(folder: Path) -> Generator[int]:
    """The port of a registry on paper, until the context ends."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "tests.scale.paper_mlflow", str(port)]
    with process(command, folder / "registry.log", os.environ):
        yield port


@contextmanager
def controller(
    plane: ControlPlane, registry_port: int, settings: Mapping[str, str] | None = None
) -> Generator[Program]:
    """Run it until the context ends; `settings` are added to SETTINGS, or take their place."""
    health_port, metrics_port = free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_"))},
        **SETTINGS,
        **(settings or {}),
        "KUBECONFIG": str(plane.kubeconfig_for(plane.accounts[ACCOUNT], name=ACCOUNT)),
        "QLORA_KUBE_CONTEXT": CONTEXT,
        "QLORA_TRACKING_URI": f"http://127.0.0.1:{registry_port}",
        "QLORA_HEALTH_PORT": str(health_port),
        "QLORA_METRICS_PORT": str(metrics_port),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MALLOC_ARENA_MAX": "2",  # as in the image
    }
    log = plane.folder / "controller.log"
    with process([sys.executable, "-m", "orchestrator.controller.cluster"], log, environment) as started:
        program = Program(process=started, metrics_port=metrics_port, registry_port=registry_port, log=log)
        _wait_until_it_leads(program)
        yield program


@contextmanager
def process(command: list[str], log: Path, environment: Mapping[str, str]) -> Generator[subprocess.Popen[bytes]]:
    """A program that runs until the context ends."""
    with log.open("ab") as output:
        started = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=output)
    try:
        yield started
    finally:
        stop_process(started, STOP_SECONDS)


def _wait_until_it_leads(program: Program) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _leads(program):
        is_late = program.process.poll() is not None or time.monotonic() > deadline
        assert not is_late, program.log.read_text()[-4000:]
        time.sleep(0.1)


def _leads(program: Program) -> bool:
    try:
        return program.samples().get("qlora_leader") == 1.0
    except (urllib.error.URLError, OSError):
        return False
