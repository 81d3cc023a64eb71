"""What a plan knows of the adapter that a job goes on from: its config, where it can be read from here.

Prepare reads it whole, and judges it. Targets that a config gives as an expression are sized as all linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import ValidationError

from orchestrator.adapters.job_store.model_config import read_adapter_config
from orchestrator.api.adapter import TAKEN_OVER, AdapterSpec
from orchestrator.api.job import QLoRAJob
from orchestrator.errors import InvalidObject, NotFound, PermanentError, StoreUnavailable
from orchestrator.ports import Store

FIELD = "spec.adapter.from"


def settled_job(job: QLoRAJob, store: Store) -> tuple[QLoRAJob, str | None]:
    """The job with what is taken over from its starting adapter, and what is to be said of that.

    Raises InvalidObject for a job to go on from that is not there.
    """
    asked = job.spec.adapter
    if asked.start is None:
        return job, None
    taken, why = _taken(job, store)
    if taken is None:
        words = f"{FIELD}: rank and target modules of {asked.start} are not known until prepare has read it"
        return job, f"{words}{why}; this is for rank {asked.rank}"
    adapter = asked.model_copy(update=taken)
    targets = adapter.target_modules
    on = ", ".join(targets) if isinstance(targets, tuple) else targets
    spec = job.spec.model_copy(update={"adapter": adapter})
    return job.model_copy(update={"spec": spec}), f"{FIELD}: rank {adapter.rank} on {on}, as {asked.start} has it"


def _taken(job: QLoRAJob, store: Store) -> tuple[Mapping[str, object] | None, str]:
    """What is taken over; None where it cannot be told from here, and why."""
    adapter = job.spec.adapter
    if adapter.starting_job is not None:
        try:
            other = store.get_job(job.metadata.namespace, adapter.starting_job)
        except NotFound as error:
            raise InvalidObject(f"{FIELD}: {error}") from error
        return {name: getattr(other.settled_spec.adapter, name) for name in TAKEN_OVER}, ""
    if adapter.start_uri is None:
        return None, ""
    try:
        config = read_adapter_config(adapter.start_uri)
    except (PermanentError, StoreUnavailable) as error:
        return None, f" ({error})"
    return (None, "") if config is None else (_of_config(adapter, config), "")


def _of_config(asked: AdapterSpec, config: Mapping[str, Any]) -> Mapping[str, object] | None:
    """As prepare would have it; None for what it will refuse."""
    targets: Any = config.get("target_modules")
    alpha: Any = config.get("lora_alpha")
    own: dict[str, object] = {
        "rank": config.get("r"),
        "alpha": int(alpha) if isinstance(alpha, float) else alpha,
        "target_modules": tuple(sorted(map(str, cast("list[object]", targets))))
        if isinstance(targets, list)
        else "all-linear",
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "experts": bool(config.get("target_parameters")),
    }
    try:
        found = AdapterSpec.model_validate({"start": asked.start, "dropout": asked.dropout, **own})
    except ValidationError:
        return None
    return {name: getattr(found, name) for name in TAKEN_OVER}
