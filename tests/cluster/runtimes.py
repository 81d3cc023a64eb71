"""Runtimes of pods on a real API server, each with a connection of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from orchestrator.adapters.kubernetes.api import KubeApi
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.adapters.kubernetes.pods import KubernetesPods, RuntimeBounds
from orchestrator.adapters.kubernetes.watch import Changes
from tests.cluster.control_plane import ControlPlane

Runtimes = Callable[..., KubernetesPods]
"""Starts one, with another policy or other bounds if asked to; it knows nothing of what another created."""


@contextmanager
def started_runtimes(cluster: ControlPlane, policy: PodPolicy, bounds: RuntimeBounds) -> Generator[Runtimes]:
    """Starts runtimes, and closes them at the end."""
    opened: list[tuple[KubernetesPods, KubeApi]] = []

    def start(policy: PodPolicy = policy, bounds: RuntimeBounds = bounds) -> KubernetesPods:
        own = cluster.api()
        runtime = KubernetesPods(own, Changes(), policy, bounds)
        opened.append((runtime, own))
        runtime.start()
        return runtime

    yield start
    for runtime, own in opened:
        runtime.close()
        own.close()
