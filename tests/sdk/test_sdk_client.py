"""The client against the real object store, with the test as the controller."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.api.job import CANCEL_ANNOTATION, QLoRAJob
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import Event
from orchestrator.errors import (
    AlreadyExists,
    Conflict,
    InvalidObject,
    JobFailed,
    NotFound,
    OrchestratorError,
    PermanentError,
    ServiceNotRunning,
    WaitTimedOut,
)
from orchestrator.sdk import AsyncClient, AsyncJobHandle, Client, JobHandle
from orchestrator.sdk.handle import SERVICE_ABSENCE_SECONDS
from orchestrator.sizing.hardware import CLASS_NAMES, gpu_class
from tests.sdk.paper_service import STEPS, PaperService, job_document, write_inputs


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)  # what `file://./` in a mapping is relative to
    return PaperService(tmp_path)


@pytest.fixture
def handle(service: PaperService) -> JobHandle:
    return service.client.submit(job_document())


def soon(action: Callable[[], object], seconds: float = 0.3) -> threading.Timer:
    """Do something while the test waits."""
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


# --- submit -------------------------------------------------------------------------------------------------------


def test_a_job_is_stored_as_it_was_written(service: PaperService, tmp_path: Path) -> None:
    handle = service.client.submit(job_document(priority=7))
    stored = service.store.get_job("default", "medical")
    assert (handle.namespace, handle.name, handle.uid) == ("default", "medical", stored.metadata.uid)
    assert stored.spec.priority == 7
    assert stored.spec.model.source == f"file://{tmp_path}/model"


def test_a_job_may_come_as_a_path_a_mapping_or_an_object(service: PaperService, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps(job_document("from-path")))
    service.client.submit(tmp_path / "a.yaml")
    service.client.submit(job_document("from-mapping"))
    written = QLoRAJob.model_validate(job_document("from-object"))
    service.client.submit(written)
    assert [job.metadata.name for job in service.client.list()] == ["from-mapping", "from-object", "from-path"]


def test_jobs_go_to_the_clients_namespace_unless_they_name_their_own(service: PaperService) -> None:
    client = Client(service.settings, connection=service.connection, namespace="team-a")
    client.submit(job_document())
    own = job_document()
    own["metadata"]["namespace"] = "team-b"
    client.submit(own)
    assert [job.key for job in client.list(all_namespaces=True)] == ["team-a/medical", "team-b/medical"]
    assert [job.key for job in client.list()] == ["team-a/medical"]


def test_nothing_is_stored_while_nobody_would_run_it(service: PaperService) -> None:
    service.running = False
    with pytest.raises(ServiceNotRunning, match="qlora up"):
        service.client.submit(job_document())
    assert service.store.list_jobs() == []


def test_a_job_for_a_cluster_names_no_file_of_this_machine(service: PaperService) -> None:
    client = Client(service.settings, connection=replace(service.connection, is_local=False))
    with pytest.raises(InvalidObject, match=r"spec\.model\.source: file:///.* is a file of one machine, .*pvc://"):
        client.submit(job_document())
    assert service.store.list_jobs() == []


def test_a_name_is_taken_once(service: PaperService, handle: JobHandle) -> None:
    with pytest.raises(AlreadyExists, match="end it with: qlora cancel medical"):
        service.client.submit(job_document())


def test_a_finished_job_is_replaced_by_one_of_its_name(service: PaperService, handle: JobHandle) -> None:
    with pytest.raises(AlreadyExists, match="has not finished"):
        service.client.submit(job_document(), replace=True)
    service.fail()
    anew = service.client.submit(job_document(priority=3), replace=True)
    assert (anew.object().spec.priority, anew.uid == handle.uid) == (3, False)
    with pytest.raises(NotFound, match="was deleted, and another one of its name was created"):
        handle.object()


def _without_model(folder: Path) -> None:
    (folder / "model").rename(folder / "elsewhere")


def _without_config(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()


def _with_broken_config(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{")


def _with_an_encoder(folder: Path) -> None:
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')


def _with_pickled_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def _without_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def _without_dataset(folder: Path) -> None:
    (folder / "train.jsonl").unlink()


def _with_empty_dataset(folder: Path) -> None:
    (folder / "train.jsonl").write_text("")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_without_model, r"spec\.model\.source: .*/model is not a folder"),
        (_without_config, r"spec\.model\.source: .* there is no config\.json"),
        (_with_broken_config, r"spec\.model\.source: .* config\.json is not valid JSON"),
        (_with_an_encoder, r"architectures is missing in config\.json"),
        (_with_pickled_weights, r"spec\.model\.source: .* only pickled weights, which can run code"),
        (_without_weights, r"spec\.model\.source: .* holds neither model.safetensors nor"),
        (_without_dataset, r"spec\.dataset\.source: .*train\.jsonl does not exist"),
        (_with_empty_dataset, r"spec\.dataset\.source: .*train\.jsonl is empty"),
    ],
)
def test_files_that_cannot_work_are_refused_at_once(
    service: PaperService, tmp_path: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    spoil(tmp_path)
    with pytest.raises(InvalidObject, match=expected):
        service.client.submit(job_document())
    assert service.store.list_jobs() == []


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"dataset": {"source": "file://./model"}}, r"spec\.dataset\.source: .*model is not a file"),
        ({"dataset": {"source": "file://./model/config.txt"}}, r"config\.txt does not exist"),
        (
            {"dataset": {"source": "file://./train.jsonl", "evalSource": "file://./eval.jsonl"}},
            r"spec\.dataset\.evalSource: .*eval\.jsonl does not exist",
        ),
        ({"dataset": {"source": "file://./model/model.safetensors"}}, "has no known ending"),
        ({"store": {"uri": "file://./train.jsonl/store"}}, r"spec\.store\.uri: .*train\.jsonl is not a folder"),
        ({"resources": {"vram": "900Gi"}}, r"no GPU here offers vram 900Gi; here are 24Gi \(24 GiB\)"),
        ({"resources": {"gpuClasses": ["80Gi"]}}, r"no GPU here offers gpuClasses 80Gi"),
        ({"training": {"sequenceLength": 1048576}}, r"the job fits no GPU here: needs .* fits 24Gi"),
    ],
)
def test_demands_that_can_never_be_met_are_refused_with_what_would_do(
    service: PaperService, spec: dict[str, object], expected: str
) -> None:
    with pytest.raises(PermanentError, match=expected):
        service.client.submit(job_document(**spec))
    assert service.store.list_jobs() == []


def test_a_demand_is_let_through_where_gpus_may_still_come(service: PaperService) -> None:
    patient = service.settings.model_copy(update={"gpu_classes_are_fixed": False})
    Client(patient, connection=service.connection).submit(job_document(resources={"vram": "900Gi"}))
    assert service.job().spec.resources.vram == "900Gi"


def test_a_manifest_with_several_objects_is_not_one_job(service: PaperService, tmp_path: Path) -> None:
    two = f"{json.dumps(job_document('a'))}\n---\n{json.dumps(job_document('b'))}\n"
    (tmp_path / "two.yaml").write_text(two)
    with pytest.raises(InvalidObject, match="holds 2 objects where one QLoRAJob is wanted"):
        service.client.submit(tmp_path / "two.yaml")


# --- plan and queues ----------------------------------------------------------------------------------------------


def test_a_plan_adds_up_and_holds_every_class_against_it(service: PaperService) -> None:
    plan = service.client.plan(job_document())
    assert plan.chosen is not None
    assert plan.chosen.gpu_class == "24Gi"
    assert (
        sum(item.bytes for item in plan.chosen.items) <= plan.chosen.usable_bytes == gpu_class("24Gi", 1).usable_bytes
    )
    remarks = {alternative.gpu_class: alternative.remark for alternative in plan.alternatives}
    assert remarks["24Gi"] == "chosen"
    assert remarks["80Gi"] == "fits; none here"
    assert list(remarks) == list(CLASS_NAMES)
    assert service.store.list_jobs() == []


def test_a_plan_says_what_here_is_cheaper_and_faster_and_whose_times_are_a_guess(service: PaperService) -> None:
    service.classes = (gpu_class("24Gi", 2, ["NVIDIA-A10G"]), gpu_class("48Gi", 1, ["NVIDIA-A40"]))
    notes = []
    for prices in ("24Gi=0.5,48Gi=0.8", "24Gi=0.5,48Gi=5", "24Gi=0.5", ""):
        settings = service.settings.model_copy(update={"gpu_prices": prices})
        notes.append(Client(settings, connection=service.connection).plan(job_document()).notes)
    assert [len(told) for told in notes] == [1, 0, 0, 0]
    assert notes[0][0].startswith("cheaper and faster: 48Gi, a step in ")
    service.classes = (gpu_class("24Gi", 1, ["something new"]),)
    assert service.client.plan(job_document()).notes == (
        "times are a guess, for A10G, the slowest of 24Gi: the cards here have not told their names",
    )


def test_a_plan_is_for_the_adapter_that_a_job_goes_on_from(service: PaperService) -> None:
    folder = Path("starting")
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    asked = {"rank": 8, "alpha": 16, "targetModules": ["q_proj", "v_proj"]}
    new = service.client.plan(job_document(adapter=asked))
    found = service.client.plan(job_document(adapter={"from": "file://./starting"}))
    assert found.chosen == new.chosen
    assert found.notes[0].startswith("spec.adapter.from: rank 8 on q_proj, v_proj, as file:///")

    service.client.submit(job_document("first", adapter=asked))
    of_job = service.client.plan(job_document("second", adapter={"from": "job:first"}))
    assert of_job.chosen == new.chosen
    with pytest.raises(InvalidObject, match=r"spec\.adapter\.from: .*nobody"):
        service.client.plan(job_document("second", adapter={"from": "job:nobody"}))
    for unknown in ("models:/first/1", "pvc://claim/adapter"):
        [words, *_] = service.client.plan(job_document(adapter={"from": unknown})).notes
        assert f"rank and target modules of {unknown} are not known until prepare has read it" in words


def test_a_plan_says_why_nothing_here_will_do(service: PaperService) -> None:
    plan = service.client.plan(job_document(resources={"vram": "80Gi"}))
    assert plan.chosen is None
    assert plan.refusal is not None
    assert "80Gi" in plan.refusal.message
    assert {a.gpu_class: a.remark for a in plan.alternatives}["24Gi"] == "ruled out by spec.resources"


def test_queues_are_created_and_replaced(service: PaperService) -> None:
    queue = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAQueue", "metadata": {"name": "team-a"}}
    service.client.apply_queue(queue)
    service.client.apply_queue({**queue, "spec": {"weight": 3}})
    assert [(queue.metadata.name, queue.spec.weight) for queue in service.client.list_queues()] == [("team-a", 3)]


def test_a_queue_that_is_not_for_the_job_is_refused_before_it_is_stored(service: PaperService) -> None:
    queue = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAQueue", "metadata": {"name": "research"}}
    service.client.apply_queue({**queue, "spec": {"namespaces": ["team-a"], "maxPriority": 5}})
    with pytest.raises(InvalidObject, match=r"^spec\.queue: queue research is not for jobs of namespace default"):
        service.client.submit(job_document(queue="research"))
    theirs = Client(service.client.settings, namespace="team-a", connection=service.client.connection)
    with pytest.raises(InvalidObject, match=r"^spec\.priority: queue research takes no priority above 5"):
        theirs.submit(job_document(queue="research", priority=6))
    assert service.store.list_jobs() == []
    assert theirs.check(job_document(queue="research", priority=5)).spec.queue == "research"


# --- following ----------------------------------------------------------------------------------------------------


def test_wait_returns_the_finished_job(service: PaperService, handle: JobHandle) -> None:
    service.prepare()
    service.train()
    timer = soon(service.succeed)
    assert handle.wait(timeout_seconds=10).status.adapter_uri is not None
    timer.join()


def test_wait_gives_up_after_its_timeout_and_says_where_the_job_is(service: PaperService, handle: JobHandle) -> None:
    service.prepare()
    began = time.monotonic()
    with pytest.raises(WaitTimedOut, match=r"had not finished after 0\.4 s: WaitingForGpu"):
        handle.wait(timeout_seconds=0.4)
    assert time.monotonic() - began < 2


def test_wait_tells_of_a_job_that_is_deleted_and_of_one_that_took_its_name(
    service: PaperService, handle: JobHandle
) -> None:
    timer = soon(lambda: service.client.delete("medical"))
    with pytest.raises(NotFound):
        handle.wait(timeout_seconds=10)
    timer.join()
    service.client.submit(job_document())
    with pytest.raises(NotFound, match="another one of its name"):
        handle.cancel()
    assert not service.job().cancelled


def test_watch_shows_every_change_once(service: PaperService, handle: JobHandle) -> None:
    seen: list[str] = []
    steps = iter([service.prepare, service.train, service.fail])
    for job in handle.watch(timeout_seconds=10):
        seen.append(job.status.summary.split(":")[0].split(",")[0])
        if (step := next(steps, None)) is not None:
            step()
    assert seen == ["", "WaitingForGpu", "Training on 24Gi", "UserError"]


def test_wait_tells_when_the_service_stays_away(service: PaperService, handle: JobHandle) -> None:
    watch = handle.start_watch()
    watch.step()
    service.running = False
    assert watch.step() is None
    watch._service_seen -= SERVICE_ABSENCE_SECONDS  # as if it had been away for so long
    with pytest.raises(ServiceNotRunning, match="qlora up"):
        watch.step()


# --- steering -----------------------------------------------------------------------------------------------------


def test_cancel_suspend_and_resume_change_the_stored_object(service: PaperService, handle: JobHandle) -> None:
    handle.suspend()
    assert service.job().spec.suspend
    handle.resume()
    assert not service.job().spec.suspend
    handle.cancel()
    assert service.job().metadata.annotations[CANCEL_ANNOTATION] == "true"
    version = service.job().metadata.resource_version
    handle.cancel()
    assert service.job().metadata.resource_version == version, "asking twice writes once"


def test_a_finished_job_is_left_alone(service: PaperService, handle: JobHandle) -> None:
    service.fail()
    before = service.job()
    assert handle.cancel() == handle.suspend() == before == service.job()


class ContendedStore(SqliteStore):
    """A store where somebody else writes right after the first so many reads."""

    races = 0

    def get_job(self, namespace: str, name: str) -> QLoRAJob:
        job = super().get_job(namespace, name)
        if self.races > 0:
            self.races -= 1
            self.update_status(job, job.status)
        return job


@pytest.mark.parametrize(("races", "written"), [(3, True), (1000, False)])
def test_a_change_that_loses_a_race_is_tried_again_a_bounded_number_of_times(
    service: PaperService, races: int, written: bool
) -> None:
    store = ContendedStore(service.settings)
    handle = Client(service.settings, connection=replace(service.connection, store=store)).submit(job_document())
    store.races = races
    if written:
        handle.suspend()
    else:
        with pytest.raises(Conflict, match="changes too often"):
            handle.suspend()
    assert service.job().spec.suspend is written


# --- results ------------------------------------------------------------------------------------------------------


def test_the_result_says_where_everything_is_and_how_good_it_became(service: PaperService, handle: JobHandle) -> None:
    service.prepare()
    service.train()
    service.succeed()
    result = handle.result()
    assert (result.eval_loss_before, result.eval_loss, result.train_loss) == (3.5, 1.75, (3.25 + 1.5) / 2)
    assert (result.steps, result.run_id, result.model_uri) == (STEPS, "run-1", "models:/medical/3")


@pytest.mark.parametrize("finish", [False, True])
def test_without_success_there_is_no_result(service: PaperService, handle: JobHandle, finish: bool) -> None:
    if finish:
        service.fail(message="line 7 is not JSON")
    expected = "has no result: UserError: line 7 is not JSON" if finish else "has not finished"
    with pytest.raises(JobFailed, match=expected):
        handle.result()
    with pytest.raises(JobFailed, match="has no adapter"):
        handle.adapter("nowhere")


def test_the_adapter_arrives_whole(service: PaperService, handle: JobHandle, tmp_path: Path) -> None:
    service.succeed()
    folder = handle.adapter(tmp_path / "out" / "adapter")
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "journal.jsonl", "manifest.json"}
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert service.job().status.adapter_digest == f"sha256:{digest}"


def test_an_adapter_that_is_here_already_is_left_as_it_is(
    service: PaperService, handle: JobHandle, tmp_path: Path
) -> None:
    service.succeed()
    folder = handle.adapter(tmp_path / "adapter")
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert handle.adapter(tmp_path / "adapter") == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(PermanentError, match="holds something else"):
        handle.adapter(tmp_path / "adapter")


def test_a_damaged_adapter_is_not_delivered(service: PaperService, handle: JobHandle, tmp_path: Path) -> None:
    service.succeed()
    stored = tmp_path / "store" / "medical" / "adapter" / "adapter_config.json"
    stored.write_bytes(b"[]")
    with pytest.raises(InvalidObject, match=r"adapter_config\.json is damaged: 2 bytes"):
        handle.adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*")), "nothing is left behind"


def test_an_adapter_that_was_replaced_is_not_delivered(
    service: PaperService, handle: JobHandle, tmp_path: Path
) -> None:
    job = service.succeed()
    service.store.update_status(job, job.status.model_copy(update={"adapter_digest": "sha256:" + "2" * 64}))
    with pytest.raises(InvalidObject, match="it was replaced"):
        handle.adapter(tmp_path / "out")


def test_a_folder_with_content_is_never_written_over(service: PaperService, handle: JobHandle, tmp_path: Path) -> None:
    service.succeed()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(PermanentError, match="not an empty folder"):
        handle.adapter(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_an_emptied_store_is_told(service: PaperService, handle: JobHandle, tmp_path: Path) -> None:
    service.succeed()
    (tmp_path / "store").rename(tmp_path / "gone")
    with pytest.raises(NotFound, match="the store was emptied"):
        handle.adapter(tmp_path / "out")
    assert handle.result().eval_loss is None, "the rest of the result is known all the same"


# --- logs, events, explain ----------------------------------------------------------------------------------------


def test_logs_come_in_the_order_of_the_attempts(service: PaperService, handle: JobHandle) -> None:
    service.write_log("train-10", "late\n")
    service.write_log("train-2", "early\n")
    service.write_log("prepare-1", "first\nunfinished")
    service.write_log("train-2-train-1", "of another job\n")
    assert [(line.stage, line.attempt, line.text) for line in handle.logs()] == [
        ("prepare", 1, "first"),
        ("prepare", 1, "unfinished"),
        ("train", 2, "early"),
        ("train", 10, "late"),
    ]
    assert [str(line) for line in handle.logs(stage="train", attempt=10)] == ["late"]


def test_following_goes_on_to_the_next_attempt_and_ends_with_the_job(service: PaperService, handle: JobHandle) -> None:
    service.write_log("prepare-1", "one\ntwo in ")
    timers = [
        soon(lambda: service.write_log("prepare-1", "two parts\n"), 0.3),
        soon(lambda: service.write_log("train-2", "three\n"), 0.6),
        soon(lambda: (service.write_log("train-2", "four"), service.fail()), 0.9),
    ]
    assert [str(line) for line in handle.logs(follow=True)] == ["one", "two in two parts", "three", "four"]
    for timer in timers:
        timer.join()


def test_a_log_that_its_place_has_forgotten_comes_from_the_jobs_store(service: PaperService, handle: JobHandle) -> None:
    store = service.folder / "job-store"
    for stage, name, text in (
        ("train-2", "log.1.jsonl", "one\n"),
        ("train-2", "log.jsonl", "two\nthree\n"),
        ("train-1", "log.jsonl", "of an attempt that the status does not name any more\n"),
        ("train-3", "log.jsonl", "as far as it was stored\n"),
    ):
        path = store / "logs" / stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ended = service.attempt("train", 2, finish_time=datetime.now(UTC), reason=Reason.LOST)
    attempts = (ended, service.attempt("train", 3))
    service.write(service.job(), store_uri=store.as_uri(), attempts=attempts, attempts_total=3)
    service.write_log("train-3", "all of it\n")
    assert [(line.attempt, line.text) for line in handle.logs()] == [
        (2, "one"),
        (2, "two"),
        (2, "three"),
        (3, "all of it"),
    ]
    assert [str(line) for line in handle.logs(attempt=1)] == ["of an attempt that the status does not name any more"]
    assert list(handle.logs(attempt=7)) == []


def test_a_log_on_a_claim_is_told_of_with_the_command_that_prints_it_and_hides_no_other(
    service: PaperService, handle: JobHandle
) -> None:
    ended = service.attempt("train", 2, finish_time=datetime.now(UTC), reason=Reason.LOST)
    service.write(service.job(), store_uri="pvc://jobs/a/medical", attempts=(ended,), attempts_total=3)
    service.write_log("train-3", "a line\n")
    told, line = handle.logs()
    words, command = told.text.split("prints it with: ")
    assert "the log of this attempt is at pvc://jobs/a/medical/logs/train-2, on a claim that only pods read" in words
    *kubectl, overrides = shlex.split(command)
    assert kubectl[:3] == ["kubectl", "--namespace=default", "run"]
    spec = json.loads(overrides.removeprefix("--overrides="))["spec"]
    assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "jobs", "readOnly": True}
    [container] = spec["containers"]
    where = container["volumeMounts"][0]["mountPath"]
    assert container["command"][-1].startswith(f"cd {where} && cat a/medical/logs/train-2/log.1.jsonl a/medical/logs/")
    assert line.text == "a line"


def test_events_come_with_their_times(service: PaperService, handle: JobHandle) -> None:
    service.fail(message="line 7 is not JSON")
    ((at, event),) = handle.events()
    assert at.endswith("Z")
    assert event == Event(reason=Reason.USER_ERROR, message="line 7 is not JSON", warning=True)


def test_explain_names_the_one_who_has_the_gpu(service: PaperService, handle: JobHandle) -> None:
    service.prepare()
    service.train()
    service.client.submit(job_document("later"))
    service.prepare("later")
    text = " ".join(service.client.handle("later").explain().sentences)
    assert "first of 1 in line for a GPU" in text
    assert "held by others: default/medical" in text
    service.running = False
    assert "qlora up" in service.client.handle("later").explain().sentences[-1]


# --- async, and what importing costs ------------------------------------------------------------------------------


def test_the_async_client_says_the_same(service: PaperService) -> None:
    async def story() -> list[object]:
        client = AsyncClient(service.settings, connection=service.connection)
        handle = await client.submit(job_document())
        service.prepare()
        service.write_log("train-2", "a line\n")
        with pytest.raises(WaitTimedOut):
            await handle.wait(timeout_seconds=0.2)
        timer = soon(service.succeed)
        job, lines = await asyncio.gather(handle.wait(timeout_seconds=10), _collect(handle.logs(follow=True)))
        timer.join()
        return [job.key, lines, (await handle.result()).eval_loss, len(await client.list())]

    assert asyncio.run(story()) == ["default/medical", ["a line"], 1.75, 1]


STEPWISE = {"start_watch", "log_steps"}
"""What the async client itself is made of."""


@pytest.mark.parametrize(("sync", "awaited"), [(Client, AsyncClient), (JobHandle, AsyncJobHandle)])
def test_the_async_client_has_what_the_client_has(sync: type, awaited: type) -> None:
    def surface(of: type) -> dict[str, list[tuple[str, object, object]]]:
        members = {name: value for name, value in vars(of).items() if not name.startswith("_")}
        functions = {name: value.fget if isinstance(value, property) else value for name, value in members.items()}
        return {name: parameters(function) for name, function in functions.items()}

    def parameters(function: Any) -> list[tuple[str, object, object]]:
        given = list(inspect.signature(function).parameters.values())[1:]
        return [(each.name, each.kind, each.default) for each in given]

    wanted = {name: known for name, known in surface(sync).items() if name not in STEPWISE}
    assert surface(awaited) == wanted
    assert all(
        inspect.iscoroutinefunction(it) or inspect.isasyncgenfunction(it) for it in map(vars(awaited).get, wanted)
    )


def test_the_rest_of_the_async_client_works(service: PaperService) -> None:
    async def story() -> None:
        client = AsyncClient(service.settings, connection=service.connection)
        handle = await client.tune("./model", [{"prompt": "2 + 2 =", "completion": " 4"}], name="medical")
        assert await handle.state() == "New"
        service.prepare()
        service.write_log("train-2", "first\nlast\n")
        service.succeed()
        assert [job.key for job in await client.wait_all([handle], 10)] == ["default/medical"]
        assert await _collect(handle.logs(tail=1)) == ["last"]
        assert (await handle.metrics()).index.tolist()
        queue = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAQueue", "metadata": {"name": "team-a"}}
        await client.apply_queue(queue)
        assert (await client.hold_queue("team-a")).spec.stops == "Hold"
        assert (await client.hold_queue("team-a", drain=True)).spec.stops == "HoldAndDrain"
        assert (await client.get_queue("team-a")).spec.stops == "HoldAndDrain"
        await client.delete_queue("team-a")
        assert await client.list_queues() == []
        await handle.delete(wait_seconds=0)

    asyncio.run(story())


async def _collect(lines: object) -> list[str]:
    return [str(line) async for line in lines]  # type: ignore[attr-defined]


def test_a_cancelled_wait_leaves_no_thread_behind_for_long(service: PaperService, handle: JobHandle) -> None:
    async def story() -> None:
        client = AsyncClient(service.settings, connection=service.connection)
        waiting = asyncio.create_task((await client.handle("medical")).wait())
        await asyncio.sleep(0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    began = time.monotonic()
    asyncio.run(story())  # joins the threads that are left
    assert time.monotonic() - began < 5


def test_importing_the_sdk_imports_nothing_heavy() -> None:
    heavy = ["torch", "ray", "mlflow", "transformers", "kubernetes", "fsspec", "rich", "typer", "numpy"]
    code = f"import sys, orchestrator.sdk; print([m for m in {heavy!r} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_a_wrong_setting_names_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    monkeypatch.setenv("QLORA_GRACE_SECONDS", "soon")
    with pytest.raises(OrchestratorError, match="QLORA_GRACE_SECONDS"):
        Client()


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((Path(orchestrator.__file__).parents[1] / "pyproject.toml").read_text())["project"]

    assert orchestrator.__version__ == project["version"]
