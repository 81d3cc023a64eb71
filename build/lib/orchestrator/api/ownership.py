"""Names in MLflow and whose they are: an experiment or a registered model belongs to the namespace in its tag.

The tag is set when it is made, and looked at before every write. A person who wants to share one names several
namespaces in it, separated by commas.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.api.job import TrackingSpec

NAMESPACE_TAG = "qlora.dev/namespace"
EXPERIMENT, REGISTERED_MODEL = "experiment", "registered model"
_FIELDS = {EXPERIMENT: "spec.tracking.experiment", REGISTERED_MODEL: "spec.tracking.registeredModel"}


def experiment_name(tracking: TrackingSpec, namespace: str) -> str:
    """The experiment of a job's run."""
    return tracking.experiment or namespace


def registered_model_name(tracking: TrackingSpec, namespace: str, job: str) -> str:
    """The registered model of a job's adapter."""
    return tracking.registered_model or f"{namespace}-{job}"


def belongs_to(tags: Mapping[str, str], namespace: str) -> bool:
    """Whether the tags name the namespace as the owner, or as one of several."""
    return namespace in (owner.strip() for owner in tags.get(NAMESPACE_TAG, "").split(","))


def refusal(kind: str, name: str, tags: Mapping[str, str], namespace: str) -> str:
    """Why a job of the namespace may not write to an experiment or a registered model, and what to do."""
    field, owner = _FIELDS[kind], tags.get(NAMESPACE_TAG)
    own = f"{namespace}-{'jobs' if name == namespace else name}"
    advice = f"set {field} to a name that is yours, such as {own}"
    if owner is not None:
        return f"the {kind} {name} belongs to namespace {owner}, not to {namespace}; {advice}"
    return (
        f"the {kind} {name} holds what no job of namespace {namespace} made; {advice}, or let its owner give it the "
        f"tag {NAMESPACE_TAG}={namespace}"
    )
