"""The manifests of examples/serving name what the job beside them publishes. vLLM and KServe are not run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from orchestrator.api.formats import ADAPTER_FOLDER, format_uris
from orchestrator.api.job import QLoRAJob
from orchestrator.core.job.stage_commands import job_store_uri
from orchestrator.core.snapshot import Policy

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
POLICY = Policy(store_uri="pvc://qlora-store/jobs")


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def the_job() -> QLoRAJob:
    (document,) = documents("job.yaml")
    document["metadata"]["uid"] = "UID"
    return QLoRAJob.model_validate(document)


def test_vllm_serves_the_adapter_of_the_job() -> None:
    job, (deployment, service) = the_job(), documents("vllm.yaml")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    args = dict(arg.removeprefix("--").partition("=")[::2] for arg in container["args"])
    assert f"hf://{args['model']}" == job.spec.model.source
    assert int(args["max-lora-rank"]) >= job.spec.adapter.rank
    on_claim = job.model_copy(update={"spec": job.spec.model_copy(update={"store": None})})
    claim, _, path = job_store_uri(on_claim, POLICY).removeprefix("pvc://").partition("/")
    (volume,), (mount,) = pod["spec"]["volumes"], container["volumeMounts"]
    assert (volume["name"], volume["persistentVolumeClaim"]["claimName"]) == (mount["name"], claim)
    name, _, folder = args["lora-modules"].partition("=")
    assert name == job.metadata.name
    assert folder == f"{mount['mountPath']}/{path}/{ADAPTER_FOLDER}"
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert {each["metadata"]["namespace"] for each in (deployment, service)} == {job.metadata.namespace}


def test_kserve_serves_the_merged_model_of_the_job() -> None:
    job, (service,) = the_job(), documents("kserve.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert "merged" in job.spec.publish.formats
    assert model["storageUri"] == format_uris(job_store_uri(job, POLICY), ["merged"])["merged"]
    assert service["metadata"]["namespace"] == job.metadata.namespace
    assert model["args"] == [f"--model_name={job.metadata.name}"]
