"""The train stage, from top to bottom: settings, data, base in NF4, adapter, resume, loop, final adapter.

Runs on one GPU (or on the CPU, for tests and demos). Everything heavy is imported after SIGTERM is being listened
to, because the imports alone take longer than some grace periods. A second run of a finished job finds its adapter and
trains nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic.alias_generators import to_camel

from orchestrator.api import trainer_facts
from orchestrator.api.adapter import TAKEN_OVER
from orchestrator.api.base import Model
from orchestrator.api.formats import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    PREPARED_FOLDER,
    START_FOLDER,
    AnswerTable,
    CheckpointManifest,
    PreparedManifest,
    StartManifest,
    checkpoint_step,
)
from orchestrator.api.losses import losses
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.api.results import Failure, PrepareResult, StageResult, StartingAdapter, TrainResult
from orchestrator.api.task import AGENT_SOCKET_VARIABLE, StageTask
from qlora_trainer import imports
from qlora_trainer.outcome import Preempted, Transient, UserError, write_result
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.final_adapter import ADAPTER_NAME, adapter_config, fetch_final_adapter
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.versions import library_versions
from qlora_trainer.tracking.holder import fetch_holder
from qlora_trainer.tracking.mlflow_run import RunLogger, attempt_tags
from qlora_trainer.training.start_up import teller, weights_told
from qlora_trainer.training.stop import AgentClient, Stop, StopNow

if TYPE_CHECKING:
    import torch

    from qlora_trainer.data.micro_batch import PreparedRows
    from qlora_trainer.model.quantized_cache import ReadAhead
    from qlora_trainer.model.training_model import TrainingModel
    from qlora_trainer.storage.checkpoint import Checkpointer
    from qlora_trainer.training.loop import Loop
    from qlora_trainer.training.samples import Sampler

TRAIN_FILE, EVAL_FILE = "train.parquet", "eval.parquet"
CLOSE_SECONDS = 10.0
HURRIED_CLOSE_SECONDS = 1.0
"""How long the end of a stage waits for MLflow; what is missing then follows with the next attempt or publish."""

SAFETENSORS_HEADER_BYTES = 1 << 20
"""Room for the names of an adapter file's tensors."""

log = logging.getLogger(__name__)


def run(task: StageTask) -> TrainResult:
    """Train to the end, or raise Preempted with what is durable."""
    stop = Stop(task.grace_seconds)
    with stop.listening():
        try:
            return _train(task, stop)
        except (StopNow, Exception) as error:
            if not stop.explains(error):
                raise
            raise Preempted(_durable(task), "stopped on request while starting up") from None


def _train(task: StageTask, stop: Stop) -> TrainResult:
    # 1. The store is ours, and the job is not finished yet.
    plan, prepared = _inputs(task)
    store = JobStore(task.store_uri)
    store.take_fence(task.attempt)
    store.sweep()
    if (finished := _finished(store, task, prepared)) is not None:
        log.info("the job's adapter is already at %s", finished.adapter_uri)
        return finished
    log_settings(task, plan, prepared)

    with ExitStack() as resources:
        agent = _agent(stop, resources)
        tell = teller(agent)

        # 2. Prepared data and base model, on this machine.
        from qlora_trainer.model.source import resolve_model

        tell("fetching the prepared data and the model")
        scratch = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="qlora-")))
        data = _fetch_prepared(store, prepared, scratch)
        folder = resolve_model(task.spec.model.source, prepared.model.revision)

        # 3. The libraries; quantized weights that are cached go to the card meanwhile.
        tell("loading the libraries")
        device, cached = _load_libraries(task, plan, folder)

        store.record_attempt(task.attempt, attempt_tags(task))

        # 4. Base in NF4 with double quantization, adapter in bfloat16.
        with weights_told(tell):
            model = _load_model(task, plan, folder, device, cached)
            if prepared.start is not None:
                tensors = _fetch_start(store, prepared.start, scratch)
                model.begin_with(tensors, is_reference=task.spec.training.objective.type == "dpo")

        # 5. Optimizer, and the state of the last checkpoint if there is one.
        from qlora_trainer.data.micro_batch import PreparedRows
        from qlora_trainer.training.generation import generation_config
        from qlora_trainer.training.loop import Loop

        checkpointer = _checkpointer(task, prepared, store, model)
        rows = PreparedRows(data / TRAIN_FILE)
        eval_rows = PreparedRows(data / EVAL_FILE) if prepared.eval_sequences else None
        training = Loop(
            task=task,
            model=model,
            train_rows=rows,
            eval_rows=eval_rows,
            sampler=_sampler(task, plan, model, data, rows, eval_rows) if eval_rows is not None else None,
            checkpointer=checkpointer,
            resumed=checkpointer.latest(),
            stop=stop,
            agent=agent,
            leave=_leave,
        )
        run_logger = RunLogger(task, training.journal)
        resources.callback(lambda: run_logger.close(HURRIED_CLOSE_SECONDS if stop.asked.is_set() else CLOSE_SECONDS))
        stop.end_start_up()

        # 6. The steps.
        training.run()
        log.info("seconds by phase: %s", {name: round(spent, 1) for name, spent in training.clock.seconds.items()})

        # 7. The last state is made durable before the adapter, so that a kill in between costs no step.
        final = training.final_adapter()
        training.report("storing the adapter")
        training.save_durably()
        generation = generation_config(model, rows, data)

        # 8. Answers to held-out prompts, where the job asks for them.
        answers = None
        if task.spec.evaluation.generation is not None:
            model.load_adapter(final)
            answers = _answers(task, model, training, stop, _Place(store=store, data=data, scratch=scratch), generation)
        adapter = checkpointer.publish_adapter(
            training.result(complete=True).step,
            final,
            training.journal.records(),
            tokenizer=data,
            generation=generation,
            answers=answers,
        )
        store.forget_answers()
        return training.result(complete=True).model_copy(
            update={"adapter_uri": adapter.uri, "adapter_digest": adapter.digest}
        )


def _sampler(
    task: StageTask, plan: MemoryPlan, model: TrainingModel, data: Path, rows: PreparedRows, eval_rows: PreparedRows
) -> Sampler | None:
    """Who asks held-out prompts at evaluations, where the job wants that."""
    from qlora_trainer.data.prompts import chosen_prompts
    from qlora_trainer.training.generation import generation_config
    from qlora_trainer.training.samples import Sampler

    spec, training = task.spec.evaluation.samples, task.spec.training
    if spec is None:
        return None
    length = training.sequence_length
    return Sampler(
        spec,
        chosen_prompts(eval_rows, count=spec.prompts, sequence_length=length, seed=training.seed),
        tokenizer=_tokenizer(data),
        ends=generation_config(model, rows, data)["eos_token_id"],
        sequence_length=length,
        row_tokens=plan.micro_batch_size * length,
    )


def _tokenizer(data: Path) -> Any:
    transformers: Any = import_module("transformers")  # Any: whose tokenizers have no types
    return transformers.AutoTokenizer.from_pretrained(str(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where things lie."""

    store: JobStore
    data: Path
    """The prepared data."""
    scratch: Path


def _answers(
    task: StageTask, model: TrainingModel, training: Loop, stop: Stop, place: _Place, generation: dict[str, Any]
) -> AnswerTable:
    """What adapter, base and the alias's holder answer; ends the model's training."""
    from qlora_trainer.data.micro_batch import PreparedRows
    from qlora_trainer.data.prompts import chosen_prompts
    from qlora_trainer.model.answering import Answerer
    from qlora_trainer.training.answers import Interview, Questions, adapter_digest

    spec, length, seed = task.spec.evaluation.generation, task.spec.training.sequence_length, task.spec.training.seed
    assert spec is not None, "asked for"
    assert task.prepared is not None, "checked at the start"
    prompts = chosen_prompts(
        PreparedRows(place.data / EVAL_FILE), count=spec.prompts, sequence_length=length, seed=seed
    )
    own = model.adapter()
    interview = Interview(
        Questions(
            spec=spec,
            prompts=prompts,
            tokenizer=_tokenizer(place.data),
            sequence_length=length,
            base=f"{task.spec.model.source} {task.prepared.model.revision}",
        ),
        Answerer(model, generation["eos_token_id"]),
        place.store,
        task.attempt,
        stopped=stop.asked.is_set,
        stop=lambda: _preempted(training),
        tell=training.report,
    )
    tracking, holder = task.spec.tracking, None
    if (alias := tracking.compared_alias) is not None:
        required = tracking.promote is not None and tracking.promote.depends_on_holder
        room = sum(tensor.nbytes for tensor in own.values()) + SAFETENSORS_HEADER_BYTES
        holder = fetch_holder(task, alias, place.scratch / "holder", largest_bytes=room, required=required)
    return interview.table(adapter_digest(own), holder)


def _preempted(training: Loop) -> NoReturn:
    raise Preempted(training.result(complete=False))


def _load_libraries(task: StageTask, plan: MemoryPlan, folder: Path) -> tuple[torch.device, ReadAhead]:
    """Import what training takes; the device, and the base's cached weights on their way to it."""
    _prepare_process(task)
    imports.load_torch()
    from qlora_trainer.model.quantized_cache import ReadAhead
    from qlora_trainer.training import runtime

    device = runtime.set_up(threads=task.threads, deterministic=task.spec.training.deterministic)
    cached = ReadAhead(folder, device, streamed_layers=plan.streamed_layers)
    imports.load_peft()
    import_module("qlora_trainer.model.training_model")
    import_module("qlora_trainer.training.loop")
    log.info("the libraries are imported: %d modules", len(sys.modules))
    return device, cached


def _load_model(
    task: StageTask, plan: MemoryPlan, folder: Path, device: torch.device, cached: ReadAhead
) -> TrainingModel:
    from qlora_trainer.kernels.packed_attention import PackedAttention
    from qlora_trainer.model.adapter import add_adapter
    from qlora_trainer.model.loading import load_base
    from qlora_trainer.model.training_model import TrainingModel

    packed_attention = PackedAttention()
    base = load_base(folder, device, packed_attention, cached, streamed_layers=plan.streamed_layers)
    peft_model = add_adapter(base, task.spec.adapter, seed=task.spec.training.seed)
    model = TrainingModel(peft_model, plan, packed_attention, float(task.spec.training.neftune_alpha))
    model.check()
    return model


def _checkpointer(task: StageTask, prepared: PrepareResult, store: JobStore, model: TrainingModel) -> Checkpointer:
    from qlora_trainer.storage.checkpoint import Checkpointer, Provenance

    provenance = Provenance(
        attempt=task.attempt,
        prepared=prepared.digest,
        adapter_config=adapter_config(model.peft_model.peft_config["default"], task),
        versions=library_versions(),
    )
    way_back_steps = task.spec.checkpoint.every_steps if task.spec.training.rolls_back else None
    return Checkpointer(store, provenance, keep=task.spec.checkpoint.keep, way_back_steps=way_back_steps)


def _inputs(task: StageTask) -> tuple[MemoryPlan, PrepareResult]:
    if task.plan is None or task.prepared is None:
        raise UserError("a train task needs a memory plan and the result of prepare; the task holds only one or none")
    batch = task.spec.training.global_batch_size
    if task.plan.micro_batch_size * task.plan.accumulation_steps != batch:
        raise UserError(
            f"the plan's {task.plan.micro_batch_size} x {task.plan.accumulation_steps} sequences are not "
            f"training.globalBatchSize, {batch}"
        )
    return task.plan, task.prepared


def log_settings(task: StageTask, plan: MemoryPlan, prepared: PrepareResult) -> None:
    """One line per resolved setting, with where it comes from; of what is not set there is nothing to say."""
    for section in ("model", "dataset", "adapter", "training", "evaluation", "checkpoint"):
        settings: Model = getattr(task.spec, section)
        for name, field in type(settings).model_fields.items():
            origin = (
                "spec" if section in task.spec.model_fields_set and name in settings.model_fields_set else "default"
            )
            if section == "adapter" and name in TAKEN_OVER and prepared.start is not None:
                origin = "adapter.from"
            if (value := getattr(settings, name)) is not None:
                log.info("%s.%s = %s (%s)", section, field.alias, value, origin)
    for name in type(plan).model_fields:
        log.info("%s = %s (plan)", to_camel(name), getattr(plan, name))
    log.info("steps = %d (prepare)", prepared.steps)
    log.info("threads = %d (task), graceSeconds = %d (task)", task.threads, task.grace_seconds)


def _prepare_process(task: StageTask) -> None:
    """What torch and CUDA read from the environment when they are loaded."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if task.spec.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", trainer_facts.cublas_workspace_config())


def _agent(stop: Stop, resources: ExitStack) -> AgentClient | None:
    path = os.environ.get(AGENT_SOCKET_VARIABLE)
    if not path:
        return None
    agent = AgentClient(Path(path), stop)
    agent.start()
    resources.callback(agent.close)
    return agent


def _fetch_prepared(store: JobStore, prepared: PrepareResult, scratch: Path) -> Path:
    name = _prepared_folder(prepared)
    manifest = store.read_manifest(name, PreparedManifest)
    if manifest is None:
        raise Transient(f"the prepared data {store.folder_uri(name)} is gone; the prepare stage must run again")
    try:
        return store.fetch_folder(name, manifest.files, scratch / "prepared")
    except DamagedFolder as error:
        raise Transient(f"the prepared data is damaged, the prepare stage must run again: {error}") from error


def _fetch_start(store: JobStore, start: StartingAdapter, scratch: Path) -> Mapping[str, torch.Tensor]:
    """The adapter that training begins with, as prepare has kept it."""
    from qlora_trainer.storage.tensors import read_tensors

    manifest = store.read_manifest(START_FOLDER, StartManifest)
    if manifest is None or manifest.start.digest != start.digest:
        raise Transient(f"the adapter that training begins with, {start.digest}, is gone from {store.uri}")
    try:
        return read_tensors(store.fetch_folder(START_FOLDER, manifest.files, scratch / "start") / ADAPTER_NAME)
    except DamagedFolder as error:
        raise Transient(f"the adapter that training begins with is damaged: {error}") from error


def _prepared_folder(prepared: PrepareResult) -> str:
    """The folder's name in the job's store: `prepared/<start of the digest>`, as its URI ends."""
    return f"{PREPARED_FOLDER}/{prepared.uri.rstrip('/').rpartition('/')[2]}"


def _finished(store: JobStore, task: StageTask, prepared: PrepareResult) -> TrainResult | None:
    """The result of an attempt that stored the final adapter and was killed before it could say so."""
    try:
        with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
            adapter = fetch_final_adapter(store, Path(scratch))
    except DamagedFolder as error:
        log.warning("the stored adapter is damaged and is made again from the last checkpoint: %s", error)
        return None
    if adapter is None or adapter.manifest.prepared != prepared.digest:
        return None
    store.forget_answers()
    return TrainResult(
        step=adapter.manifest.step,
        complete=True,
        adapter_uri=store.folder_uri(ADAPTER_FOLDER),
        adapter_digest=adapter.digest,
        **asdict(losses(adapter.journal, task.spec.evaluation)),
    )


def _durable(task: StageTask) -> TrainResult | None:
    """What an attempt that is stopped while it starts up can vouch for: the newest checkpoint of an earlier one."""
    if task.prepared is None:
        return None
    store = JobStore(task.store_uri)
    for name in sorted(store.list_folders(CHECKPOINTS_FOLDER), key=checkpoint_step, reverse=True):
        manifest = store.read_manifest(name, CheckpointManifest)
        if manifest is not None and manifest.prepared == task.prepared.digest:
            return TrainResult(step=manifest.step, checkpoint_uri=store.folder_uri(name), complete=False)
    return TrainResult(step=0, complete=False)


def _leave(result: TrainResult) -> NoReturn:
    """End the process at once, with the verdict that a Preempted would have given."""
    failure = Failure(reason=Reason.PREEMPTED, message="stopped on request inside a step")
    write_result(StageResult(train=result, failure=failure))
    logging.shutdown()
    os._exit(ExitCode.PREEMPTED)
