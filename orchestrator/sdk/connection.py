"""What the client talks to: an object store, the place of the stages' logs, and whether anybody is at work.

`embedded` opens the service of this machine, `on_cluster` one on Kubernetes, and `connect` what
the settings name. None of them imports ray or mlflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from orchestrator.errors import InvalidObject
from orchestrator.ports import Store
from orchestrator.sdk.logs import LogFolder, StageLogs
from orchestrator.settings import ENVIRONMENT_PREFIX, Settings
from orchestrator.sizing.gpu_table import BUILT_IN, GpuTable, gpu_table
from orchestrator.sizing.hardware import GpuClass

CURRENT_CONTEXT = "current"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One service, as its clients see it."""

    store: Store
    is_running: Callable[[], bool]
    """Whether a controller is at work; objects can be read and written without one."""
    gpu_classes: Callable[[], Sequence[GpuClass]]
    """What jobs are sized for."""
    logs: StageLogs
    """What stages wrote."""
    namespace: str = "default"
    """Where jobs go that name none."""
    is_local: bool = True
    """Whether stages see the files of this machine."""


def read_settings() -> Settings:
    """The settings of this process's environment; raises InvalidObject naming the variable."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{_variable(details['loc'])}: {details['msg']}" for details in error.errors()]
        raise InvalidObject("\n".join(lines)) from error


def connect(settings: Settings, namespace: str | None = None) -> Connection:
    """The service that `context` names, for work in a namespace, its own one by default."""
    if not settings.context:
        return embedded(settings)
    context = "" if settings.context == CURRENT_CONTEXT else settings.context
    return on_cluster(context, namespace, gpu_table(settings.gpu_class_definitions))


def on_cluster(context: str, namespace: str | None = None, table: GpuTable = BUILT_IN) -> Connection:
    """The service on the cluster of a kubeconfig context, the current one by default.

    Only the namespace is watched: an account may have no rights beyond it.

    Raises InvalidObject where there is no such context, MissingExtra without the Kubernetes client.
    """
    try:
        from orchestrator.adapters.kubernetes.api import KubeApi
    except ModuleNotFoundError:
        from orchestrator.sdk import extras

        extras.require("kubernetes", purpose="a service on a cluster")
        raise
    from orchestrator.adapters.kubernetes.nodes import list_gpu_classes
    from orchestrator.adapters.kubernetes.pod_logs import PodLogs
    from orchestrator.adapters.kubernetes.store import KubernetesStore

    api = KubeApi(context)
    return Connection(
        store=KubernetesStore(api, watched=(namespace or api.namespace,)),
        is_running=lambda: True,  # the API server keeps the job until a controller comes
        gpu_classes=lambda: list_gpu_classes(api, table),
        logs=PodLogs(api),
        namespace=api.namespace,
        is_local=False,
    )


def embedded(settings: Settings) -> Connection:
    """The service of this machine."""
    from orchestrator.adapters.local.slots import find_slots
    from orchestrator.adapters.sqlite.store import SqliteStore
    from orchestrator.controller import supervisor

    return Connection(
        store=SqliteStore(settings),
        is_running=lambda: supervisor.status(settings).running,
        gpu_classes=lambda: find_slots(settings.gpu_classes, gpu_table(settings.gpu_class_definitions)).classes,
        logs=LogFolder(settings.logs_folder / "stages"),
    )


def _variable(location: tuple[int | str, ...]) -> str:
    name = str(location[0]) if location else ""
    return name if name.startswith(ENVIRONMENT_PREFIX) or name.isupper() else f"{ENVIRONMENT_PREFIX}{name.upper()}"
