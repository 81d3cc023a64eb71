"""A program of the cluster, the controller by default, as a process of a test: started, kept running, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.control_plane import free_ports

SETTINGS = {
    "QLORA_NAMESPACE": "default",
    "QLORA_POD_NAME": "controller-0",
    "QLORA_STORE_URI": "s3://adapters/jobs",
    "QLORA_TRAINER_IMAGE": "trainer:1",
    "QLORA_LEASE_DURATION_SECONDS": "3",
    "QLORA_LEASE_RENEW_SECONDS": "2",
    "QLORA_LEASE_RETRY_SECONDS": "0.3",
    "QLORA_TICK_SECONDS": "0.5",
    "QLORA_COMMAND_BACKOFF_BASE_SECONDS": "0.1",
    "QLORA_COMMAND_BACKOFF_MAX_SECONDS": "1",
    "QLORA_BACKOFF_BASE_SECONDS": "0.2",
    "QLORA_RELIST_SECONDS": "3",
    "QLORA_MINIMUM_RUN_SECONDS": "0",
    "QLORA_PREEMPTION_COOLDOWN_SECONDS": "0",
}


CONTROLLER, PAGE = "controller", "page"


class Program:
    """Its process, started again whenever it is gone."""

    def __init__(
        self, kubeconfig: Path, folder: Path, settings: Mapping[str, str] | None = None, name: str = CONTROLLER
    ) -> None:
        """`settings` are added to SETTINGS, or take their place."""
        self._folder = folder
        self._name = name
        self.health_port, self.page_port, metrics = free_ports(3)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "MLFLOW_"))},
            **SETTINGS,
            "QLORA_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            **(settings or {}),
            "KUBECONFIG": str(kubeconfig),
            "QLORA_KUBE_CONTEXT": "test",
            "QLORA_ARTIFACT_ROOT": str(folder / "artifacts"),
            "QLORA_HEALTH_PORT": str(self.health_port),
            "QLORA_PAGE_PORT": str(self.page_port),
            "QLORA_METRICS_PORT": str(metrics),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """All that it said."""
        return self._folder / f"{self._name}.log"

    def keep_running(self) -> None:
        """Start it if it is not there, as a kubelet would."""
        if self.process is None or self.process.poll() is not None:
            with self.log.open("ab") as log:
                command = [sys.executable, "-m", f"orchestrator.{self._name}.cluster"]
                self.process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
