"""The Python client. Importing it is cheap: no torch, no ray, no mlflow.

from orchestrator.sdk import Client

job = Client().submit("job.yaml")
job.wait()
print(job.result().eval_loss)
"""

from orchestrator.api.job import (
    AdapterSpec,
    CheckpointSpec,
    DatasetSource,
    EvaluationSpec,
    GateRule,
    GenerationSpec,
    ModelSource,
    ObjectMeta,
    PrepareSpec,
    PromoteSpec,
    QLoRAJob,
    QLoRAJobSpec,
    QLoRAJobStatus,
    ResourcesSpec,
    StoreSpec,
    TrackingSpec,
    TrainingSpec,
)
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueSpec, Quota
from orchestrator.api.sweep import EarlyStop, QLoRASweep, QLoRASweepSpec, SweepDimension, SweepMeta, SweepMetric
from orchestrator.errors import (
    AlreadyExists,
    Conflict,
    InvalidObject,
    JobFailed,
    MissingExtra,
    NotFound,
    OrchestratorError,
    PermanentError,
    ServiceNotRunning,
    StoreUnavailable,
    TransientError,
    WaitTimedOut,
)
from orchestrator.sdk.async_client import AsyncClient, AsyncJobHandle
from orchestrator.sdk.client import Client
from orchestrator.sdk.explanation import Explanation
from orchestrator.sdk.handle import JobHandle, JobResult
from orchestrator.sdk.logs import LogLine
from orchestrator.sdk.manifest import load_manifest
from orchestrator.sdk.planning import Alternative, JobPlan
from orchestrator.settings import Settings

__all__ = [
    "AdapterSpec",
    "AlreadyExists",
    "Alternative",
    "AsyncClient",
    "AsyncJobHandle",
    "CheckpointSpec",
    "Client",
    "Conflict",
    "DatasetSource",
    "EarlyStop",
    "EvaluationSpec",
    "Explanation",
    "GateRule",
    "GenerationSpec",
    "InvalidObject",
    "JobFailed",
    "JobHandle",
    "JobPlan",
    "JobResult",
    "LogLine",
    "MissingExtra",
    "ModelSource",
    "NotFound",
    "ObjectMeta",
    "OrchestratorError",
    "PermanentError",
    "PrepareSpec",
    "PromoteSpec",
    "QLoRAJob",
    "QLoRAJobSpec",
    "QLoRAJobStatus",
    "QLoRAQueue",
    "QLoRAQueueSpec",
    "QLoRASweep",
    "QLoRASweepSpec",
    "Quota",
    "ResourcesSpec",
    "ServiceNotRunning",
    "Settings",
    "StoreSpec",
    "StoreUnavailable",
    "SweepDimension",
    "SweepMeta",
    "SweepMetric",
    "TrackingSpec",
    "TrainingSpec",
    "TransientError",
    "WaitTimedOut",
    "load_manifest",
]
