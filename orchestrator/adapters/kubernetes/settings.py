"""Settings of the controller on Kubernetes, read from the environment; the Helm chart sets them.

Every field is the environment variable `QLORA_<FIELD>`. They are read once, when the program starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from orchestrator.adapters.kubernetes.pod_facts import RuntimeBounds
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy, PodTemplate
from orchestrator.api.base import StoreUri
from orchestrator.core.job.addresses import AddressRules
from orchestrator.errors import InvalidObject
from orchestrator.settings import GpuClassesText, Seconds, ServiceSettings
from orchestrator.sizing.gpu_table import gpu_table
from orchestrator.sizing.hardware import GIB

Port = Annotated[int, Field(ge=1, le=65_535)]
Parts = Annotated[list[dict[str, Any]], Field(max_length=64)]  # Any: Kubernetes' own objects, which the server checks
Words = Annotated[dict[str, str], Field(max_length=64)]
SecretName = Annotated[str, StringConstraints(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)]
RAY_ADDRESSES_PATTERN = r"^([a-z0-9-]+=[^,=]+:[0-9]{1,5}(,[a-z0-9-]+=[^,=]+:[0-9]{1,5})*)?$"
STORE_URIS_PATTERN = r"^((pvc|s3)://[^\s,]+(,(pvc|s3)://[^\s,]+)*)?$"
TEMPLATE_BYTES = 256 * 2**10


class TemplateFile(BaseModel):
    """What an operator may add to the pods of stages, in Kubernetes' own words."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)

    labels: Words = {}
    annotations: Words = {}
    node_selector: Words = {}
    tolerations: Parts = []
    topology_spread_constraints: Parts = []
    env: Parts = []
    env_from: Parts = []
    volumes: Parts = []
    volume_mounts: Parts = []
    image_pull_secrets: Parts = []
    priority_class_name: str = ""
    runtime_class_name: str = ""
    scheduler_name: str = ""


class ClusterSettings(ServiceSettings):
    """Where the controller works, and what it gives to pods."""

    kube_context: str = "in-cluster"
    """`in-cluster` is the pod's own service account; anything else a context of `KUBECONFIG`."""
    namespace: str = Field(min_length=1)
    """Where the controller itself lives, and its lease."""
    pod_name: str = Field(min_length=1)
    """Its identity in the election."""
    lease_name: str = "qlora-orchestrator"
    """The lease that controllers of the same jobs share."""
    watch_namespaces: Annotated[str, StringConstraints(pattern=r"^([a-z0-9-]+(,[a-z0-9-]+)*)?$")] = ""
    """Namespaces of jobs, separated by commas; empty is all of them."""
    store_uri: StoreUri
    """Where jobs that name no store keep their data."""
    store_uris: Annotated[str, StringConstraints(pattern=STORE_URIS_PATTERN)] = ""
    """Stores that jobs may name besides that, separated by commas; any other is refused."""
    reserved_claims: Annotated[str, StringConstraints(pattern=r"^([a-z0-9.-]+(,[a-z0-9.-]+)*)?$")] = ""
    """Claims that no job may name, separated by commas, such as MLflow's; the model cache's is one anyway."""
    tracking_uri: str = Field(min_length=1)
    """The MLflow tracking and registry URI."""
    artifact_root: Path | None = None
    """Artifacts of experiments that the service creates where MLflow is no server."""
    trainer_image: str = Field(min_length=1)
    """The image of the stages."""
    controller_image: str = ""
    """The image of Ray's agent beside a trainer: the controller's own."""
    ray_address: Annotated[str, StringConstraints(pattern=r"^(.+:[0-9]{1,5})?$")] = ""
    """`host:port` of Ray's head for the agents of all namespaces; without it and the next one there are no agents."""
    ray_addresses: Annotated[str, StringConstraints(pattern=RAY_ADDRESSES_PATTERN)] = ""
    """`namespace=host:port` of the head of each namespace that has one of its own, separated by commas."""
    ray_auth_secret: str = ""
    """The Secret with Ray's token, in the namespaces of jobs."""
    ray_node_port: Port = 6380
    """The first of the ports that an agent's Ray listens on, in the pod of a stage."""
    ray_fabric_socket: Path = Path("/var/run/qlora/fabric.sock")
    """Where the head beside the controller listens for it; that of a namespace in a folder of the namespace's name."""
    gpu_resource: str = "nvidia.com/gpu"
    """The extended resource that is one GPU."""
    gpu_mode: Literal["device-plugin", "mig", "dra"] = "device-plugin"
    """How a GPU is asked for."""
    gpu_classes: GpuClassesText = ""
    """GPUs that an autoscaler can bring up, such as `24Gi=4,48Gi=2`; what nodes have now counts where it is more."""
    gpu_classes_are_fixed: bool = False
    """No other GPU can appear later: a job that fits none of them fails at once instead of waiting."""
    pod_template_file: Path | None = None
    """YAML with what is added to every pod."""
    model_cache: Annotated[str, StringConstraints(pattern=r"^(pvc://[a-z0-9.-]+|hostpath:///.+)?$")] = ""
    """Where models are kept between jobs; empty means that every stage fetches its own."""
    model_cache_gib: float = Field(default=1000.0, gt=0, le=1_000_000)
    """How much of it fetched models and data sets may take, in GiB; what is in use stays, and of the rest what was
    used longest ago goes first. Quantized weights have a bound of their own."""
    model_cache_wait_seconds: Seconds = 600.0
    """A stage waits for another one that fetches the same model for as long as something comes, and so much longer."""
    train_memory_bytes: int = Field(default=4 * GIB, ge=2**28)
    """Host memory of a train stage on top of what its model and plan ask for; its limit is twice what it requests."""
    cpu_stage_memory_bytes: int = Field(default=2 * GIB, ge=2**28)
    """Host memory that a prepare or publish stage requests; its limit is twice that."""
    trainer_threads: int = Field(default=4, ge=1, le=1024)
    """CPU threads of each stage; part of what makes results repeatable."""
    cpu_stages_limit: int = Field(default=64, ge=1, le=100_000)
    """Prepare and publish stages that may run at one time, and one more of a namespace that has none."""
    unschedulable_seconds: Seconds = 900.0
    """A pod that no node has taken for so long is given up, and its class is passed over for a while."""
    scale_up_seconds: Seconds = 1800.0
    """The same for a GPU class of `gpu_classes` of which nodes have less now than is declared there: an autoscaler may
    be about to bring one up."""
    short_grace_seconds: int = Field(default=15, ge=1, le=86_400)
    """A trainer that gets a signal, or whose machine is taken away, is to have saved its state within so long, or the
    grace period where that is less: nodes that shut down and spot machines give no more. A step that takes longer is
    given up."""
    stranded_seconds: Seconds = 60.0
    """A pod that should have ended is given up after so long where its node does not answer: its job goes on elsewhere,
    and its GPU is given to nobody until the node is back or gone."""
    unending_seconds: Seconds = 900.0
    """The same where its node answers and does not end it."""
    force_delete_unreachable: bool = False
    """A pod that was given up on a node that does not answer is deleted for good, which frees its volumes; something of
    it may still run and write to them, so only where a node that does not answer is as good as gone."""
    progress_interval_seconds: float = Field(default=30.0, ge=0, le=3600)
    """A running job's progress is recorded at most so often; the end of a stage always is."""
    webhook_secret: SecretName = "qlora-webhooks"  # noqa: S105 - its name
    """The Secret with the secrets of webhooks by their names: in each namespace of jobs, and beside the controller for
    those of queues. Empty: no webhook is told anything."""
    relist_seconds: Seconds = 600.0
    """Everything is listed anew so often, whatever the watches have told."""
    mlflow_workers: int = Field(default=4, ge=1, le=64)
    """Calls that MLflow is asked to answer at one time."""
    writers: int = Field(default=16, ge=1, le=64)
    """Jobs that the controller writes to the API server about at one time."""
    kube_requests_per_second: float = Field(default=0.0, ge=0, le=1_000_000)
    """Requests about each kind of object that the controller makes to the API server in the long run; 0 is no bound but
    the server's own. The lease is beyond it."""
    kube_requests_burst: int = Field(default=100, ge=1, le=1_000_000)
    """As many at once after a pause, where there is a bound."""
    tick_minimum_seconds: float = Field(default=0.02, ge=0, le=60)
    """The controller rests at least so long between two looks."""
    lease_duration_seconds: int = Field(default=15, ge=3, le=3600)
    """Another replica takes over so long after the leader's last sign of life."""
    lease_renew_seconds: Seconds = 10.0
    """A leader that could not renew for so long stops; less than the duration."""
    lease_retry_seconds: Seconds = 2.0
    """Between two looks at the lease."""
    metrics_port: Port = 8080
    """The port of `/metrics`."""
    health_port: Port = 8081
    """The port of `/healthz` and `/readyz`."""
    page_port: Port = 8082
    """The port of the page, which is a program of its own."""
    page_review_seconds: Seconds = 60.0
    """The page asks the API server anew whose a token is and what that account may list after so long: rights that were
    taken away are gone from the page by then."""
    page_review_timeout_seconds: Seconds = 5.0
    """How long the API server may take to answer that, and a visitor to be in turn: one is asked about at one time."""
    page_reviews_per_second: float = Field(default=100.0, gt=0, le=1_000_000)
    """Such requests of each kind that the page makes to the API server in the long run."""
    page_reviews_burst: int = Field(default=200, ge=1, le=1_000_000)
    """As many at once after a pause."""
    page_strangers_per_second: float = Field(default=5.0, gt=0, le=10_000)
    """Tokens that the page has not seen before are asked about so often; others are refused until then. Those who are
    known are not held up by a flood of them."""
    page_visitors_kept: int = Field(default=256, ge=1, le=100_000)
    """Visitors whose rights the page remembers, and as many tokens that are nobody's."""
    page_namespaces_limit: int = Field(default=100, ge=1, le=10_000)
    """Of so many namespaces with jobs the page asks whether a visitor may list their jobs, who may not list all."""
    page_login_seconds: int = Field(default=28_800, ge=60, le=2_592_000)
    """A browser keeps a token for so long; a token that expires earlier ends with that."""

    @model_validator(mode="after")
    def _a_leader_stops_before_another_starts(self) -> ClusterSettings:
        if not self.lease_retry_seconds < self.lease_renew_seconds < self.lease_duration_seconds:
            raise ValueError("wanted: lease_retry_seconds < lease_renew_seconds < lease_duration_seconds")
        return self

    @property
    def has_agents(self) -> bool:
        """Whether somebody beside each trainer passes its reports on: Ray's agent."""
        return bool(self.ray_address or self.ray_addresses)

    @property
    def heads(self) -> Mapping[str, str]:
        """`host:port` of Ray's head by the namespace that it serves alone."""
        return dict(each.split("=", 1) for each in self.ray_addresses.split(",") if each)

    @property
    def addresses(self) -> AddressRules:
        """Which URIs jobs may name."""
        cache = urlsplit(self.model_cache)
        claims = {*self.reserved_claims.split(","), cache.netloc if cache.scheme == "pvc" else ""}
        return AddressRules(
            restricted=True,
            stores=tuple(filter(None, self.store_uris.split(","))),
            reserved_claims=frozenset(claims - {""}),
        )

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The namespaces of jobs; one that is empty is all of them."""
        return tuple(self.watch_namespaces.split(","))

    def pod_policy(self) -> PodPolicy:
        """What pods depend on. Raises InvalidObject for a template that breaks a rule."""
        return PodPolicy(
            trainer_image=self.trainer_image,
            controller_image=self.controller_image,
            tracking_uri=self.tracking_uri,
            gpu_resource=self.gpu_resource,
            gpu_mode=self.gpu_mode,
            gpu_table=gpu_table(self.gpu_class_definitions),
            ray_address=self.ray_address,
            ray_addresses=self.heads,
            ray_auth_secret=self.ray_auth_secret,
            ray_node_port=self.ray_node_port,
            model_cache=self.model_cache,
            model_cache_gib=self.model_cache_gib,
            model_cache_wait_seconds=self.model_cache_wait_seconds,
            train_memory_bytes=self.train_memory_bytes,
            cpu_stage_memory_bytes=self.cpu_stage_memory_bytes,
            short_grace_seconds=self.short_grace_seconds,
            template=read_template(self.pod_template_file) if self.pod_template_file else PodTemplate(),
        )

    def runtime_bounds(self) -> RuntimeBounds:
        """How long pods may take."""
        return RuntimeBounds(
            gpu_classes=self.gpu_classes,
            unschedulable_seconds=self.unschedulable_seconds,
            scale_up_seconds=self.scale_up_seconds,
            short_grace_seconds=self.short_grace_seconds,
            stranded_seconds=self.stranded_seconds,
            unending_seconds=self.unending_seconds,
            force_delete_unreachable=self.force_delete_unreachable,
        )


def read_template(path: Path) -> PodTemplate:
    """The operator's additions. Raises InvalidObject, which names the file and the field."""
    try:
        with path.open("rb") as file:
            read = TemplateFile.model_validate(yaml.safe_load(file.read(TEMPLATE_BYTES)) or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidObject(f"{path}: {where}: {first['msg']}") from error
    except (OSError, yaml.YAMLError) as error:
        raise InvalidObject(f"{path} cannot be read: {error}") from error
    return PodTemplate(**read.model_dump())
