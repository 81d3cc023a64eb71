"""Sized too small, on purpose: the job escalates by itself, plan by plan and then to the next class, and loses nothing.

Everything is real but the lack of memory (`short_of_memory`): service, stages, trainer, MLflow.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.e2e.jobs import Document, tiny_job
from tests.trainer.tiny_model import tiny_model

pytestmark = pytest.mark.timeout(900)

STEPS = 24
STEPS_BEFORE_IT_IS_FULL = 5
CHECKPOINT_STEPS = 2
GLOBAL_BATCH = 2
LADDER = (
    ("24Gi", 2, 0, ()),
    ("24Gi", 2, 2, ()),
    ("24Gi", 2, 2, ("activations", "embeddings")),
    ("24Gi", 1, 2, ("activations", "embeddings")),
    ("48Gi", 2, 0, ()),
)
"""GPU class, micro-batch, recomputed layers and what is offloaded, of every train attempt."""
ROUNDING = 0.02
"""How far a step's losses may be apart, in nats: other micro-batches add up in another order, in bfloat16."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two classes, and a trainer that runs out of memory on all of the smaller one's plans."""
    program = Path(__file__).with_name("short_of_memory.py")
    short = shlex.join([sys.executable, str(program), str(len(LADDER) - 1), str(STEPS_BEFORE_IT_IS_FULL)])
    return Settings(
        home=tmp_path_factory.mktemp("home"),
        gpu_classes="24Gi=1,48Gi=1",
        backoff_base_seconds=0.2,
        backoff_max_seconds=1.0,
        trainer_threads=1,
        trainer_command=short,
    )


def job_document(name: str, **spec: object) -> Document:
    """Nothing is drawn that depends on the micro-batch, so that losses can be compared step by step."""
    document = tiny_job(name, tiny_model(), steps=STEPS, checkpoint_steps=CHECKPOINT_STEPS)
    wanted = document["spec"]
    assert isinstance(wanted, dict)
    training = {**wanted["training"], "neftuneAlpha": "0", "globalBatchSize": GLOBAL_BATCH}
    adapter = {**wanted["adapter"], "dropout": "0"}
    return {**document, "spec": {**wanted, "training": training, "adapter": adapter, "backoffLimit": 6, **spec}}


@pytest.fixture(scope="module")
def undisturbed(client: Client) -> JobHandle:
    return finished(client, job_document("plenty"))


@pytest.fixture(scope="module")
def escalated(client: Client) -> JobHandle:
    return finished(client, job_document("short"))


def finished(client: Client, document: Document) -> JobHandle:
    handle = client.submit(document)
    handle.wait(timeout_seconds=600)
    return handle


def test_it_walks_down_the_plans_and_then_up_to_the_next_class(escalated: JobHandle) -> None:
    status = escalated.status()
    attempts = [attempt for attempt in status.attempts if attempt.stage == "train"]
    walked = [(a.gpu_class, a.plan.micro_batch_size, a.plan.recompute_layers, a.plan.offload) for a in attempts]
    assert tuple(walked) == LADDER, status.summary
    assert all(a.plan.micro_batch_size * a.plan.accumulation_steps == GLOBAL_BATCH for a in attempts)
    assert [a.reason for a in attempts] == [Reason.OUT_OF_MEMORY] * (len(LADDER) - 1) + [Reason.SUCCEEDED]


def test_status_and_events_say_so(escalated: JobHandle) -> None:
    status = escalated.status()
    assert (status.step_ups, status.failures_total) == (len(LADDER) - 1, len(LADDER) - 1)
    assert status.condition(ConditionType.FINISHED).reason is Reason.SUCCEEDED
    told = [e.message for _, e in escalated.events() if e.message.startswith("out of memory under")]
    assert len(told) == len(LADDER) - 1
    assert sum(m.endswith("on 48Gi") for m in told) == 1


def test_the_losses_are_those_of_a_run_with_room_enough(
    settings: Settings, undisturbed: JobHandle, escalated: JobHandle
) -> None:
    expected, found = losses(settings, undisturbed), losses(settings, escalated)
    assert [step for step, _ in found] == list(range(1, STEPS + 1)), "each step once, none missing"
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=ROUNDING)
    assert escalated.result().eval_loss == pytest.approx(undisturbed.result().eval_loss, abs=ROUNDING)


def test_the_adapter_is_there_and_the_run_shows_every_plan(
    settings: Settings, escalated: JobHandle, tmp_path: Path
) -> None:
    assert (escalated.adapter(tmp_path / "adapter") / "adapter_model.safetensors").exists()
    run = MlflowClient(settings.tracking_uri).get_run(escalated.status().mlflow.run_id)
    plans = [json.loads(value) for key, value in sorted(run.data.tags.items()) if key.startswith("qlora.dev/plan/")]
    assert [plan["microBatchSize"] for plan in plans] == [size for _, size, _, _ in LADDER]


def test_the_ladder_is_bounded_by_the_backoff_limit_while_no_checkpoint_comes(client: Client) -> None:
    document = job_document("short-tempered", backoffLimit=1, checkpoint={"everySeconds": 3600, "everySteps": 1000})
    job: QLoRAJob = client.submit(document).wait(timeout_seconds=300)
    finish = job.status.condition(ConditionType.FINISHED)
    assert (finish.reason, job.status.failures_total) == (Reason.BACKOFF_LIMIT_EXCEEDED, 2)
    assert "out of memory" in finish.message.lower()


def losses(settings: Settings, handle: JobHandle) -> list[tuple[int, float]]:
    """Step and training loss, as MLflow has them."""
    history = MlflowClient(settings.tracking_uri).get_metric_history(handle.status().mlflow.run_id, "train/loss")
    return [(metric.step, metric.value) for metric in sorted(history, key=lambda metric: metric.step)]
