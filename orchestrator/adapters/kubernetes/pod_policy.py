"""What pods depend on besides their task: the settings, and what an operator may add to every pod."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.errors import InvalidObject
from orchestrator.sizing.gpu_table import BUILT_IN, GpuTable
from orchestrator.sizing.hardware import GIB

Manifest = dict[str, object]
TERMINATION_LOG = "/dev/termination-log"
SCRATCH_PATH, SOCKET_FOLDER, CACHE_PATH = "/tmp", "/var/run/qlora", "/var/cache/qlora"  # noqa: S108  volumes
CLAIMS_PATH = "/var/lib/qlora/pvc"
OWN_PATHS = (SCRATCH_PATH, SOCKET_FOLDER, CACHE_PATH, CLAIMS_PATH, TERMINATION_LOG)
"""Where nothing else may be mounted, nor above."""
RESERVED_VOLUMES = ("scratch", "agent", "agent-scratch", "agent-token", "model-cache")
CLAIM_VOLUME = "claim-"
PREPARE_RAY_VARIABLE = "RAY_ADDRESS"
"""Ray's own name for where a cluster is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTemplate:
    """What an operator may add to every pod: Kubernetes' own fields, as they are."""

    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    node_selector: Mapping[str, str] = field(default_factory=dict[str, str])
    tolerations: Sequence[Manifest] = ()
    topology_spread_constraints: Sequence[Manifest] = ()
    env: Sequence[Manifest] = ()
    env_from: Sequence[Manifest] = ()
    volumes: Sequence[Manifest] = ()
    volume_mounts: Sequence[Manifest] = ()
    image_pull_secrets: Sequence[Manifest] = ()
    priority_class_name: str = ""
    runtime_class_name: str = ""
    scheduler_name: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidObject for what would take the place of something that is decided here."""
        for volume in self.volumes:
            name = str(volume.get("name", ""))
            if name in RESERVED_VOLUMES or name.startswith(CLAIM_VOLUME):
                raise InvalidObject(f"the pod template's volume {name!r} has a name that is taken; give it another")
        for mount in self.volume_mounts:
            path = f"{str(mount.get('mountPath', '')).rstrip('/')}/"
            taken = next((own for own in OWN_PATHS if f"{own}/".startswith(path)), None)
            if taken is not None:
                raise InvalidObject(f"the pod template mounts {path} over {taken}, which is taken; choose another path")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPolicy:
    """The settings that pods depend on."""

    trainer_image: str
    controller_image: str = ""
    """The agent's."""
    tracking_uri: str
    gpu_resource: str = "nvidia.com/gpu"
    gpu_mode: Literal["device-plugin", "mig", "dra"] = "device-plugin"
    gpu_table: GpuTable = BUILT_IN
    """The classes that cards are sorted into."""
    ray_address: str = ""
    """`host:port` of Ray's head; empty means no agent."""
    ray_addresses: Mapping[str, str] = field(default_factory=dict[str, str])
    """The same for the namespaces that have a head of their own."""
    ray_auth_secret: str = ""
    ray_node_port: int = 6380
    model_cache: str = ""
    """`pvc://claim` or `hostpath:///path`; empty means that models are fetched into scratch space."""
    model_cache_gib: float = 1000.0
    model_cache_wait_seconds: float = 600.0
    train_memory_bytes: int = 4 * GIB
    """Host memory of a train stage on top of what its model and plan ask for."""
    cpu_stage_memory_bytes: int = 2 * GIB
    short_grace_seconds: int = 15
    """What a signal is taken to leave a trainer at least: machines that go give less than the pod's grace period."""
    template: PodTemplate = PodTemplate()

    @property
    def names_ray_cluster(self) -> bool:
        """Whether the operator's template names a Ray cluster, which prepare stages with workers then use."""
        return any(variable.get("name") == PREPARE_RAY_VARIABLE for variable in self.template.env)

    def ray_address_for(self, namespace: str) -> str:
        """`host:port` of the head of a namespace's stages; empty means no agent."""
        return self.ray_addresses.get(namespace, self.ray_address)
