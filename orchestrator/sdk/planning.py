"""What a job would take, and where: the core's own choice, asked before anything runs.

`Client.plan` and `qlora plan` show it, `Client.submit` refuses what it says can never run. The bytes and the choice
come from `sizing/plan_search`, the very code that decides; here they are only put side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.api.job import QLoRAJob, QLoRAJobSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.optimizer_steps import steps_warning
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import Refusal
from orchestrator.sdk.data_count import DataCount
from orchestrator.sizing import hardware, plan_search
from orchestrator.sizing.footprint import offloaded_host_bytes
from orchestrator.sizing.gpu_table import BUILT_IN, GpuTable, undefined
from orchestrator.sizing.guess import guess_words
from orchestrator.sizing.hardware import GIB, GpuClass
from orchestrator.sizing.margins import DEFAULT, Margins
from orchestrator.sizing.step_time import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What a GPU class would mean for the job."""

    gpu_class: str
    capacity: int | None
    """GPUs of the class that exist here; absent where the account may not read that."""
    estimate: Estimate | None
    """The fastest plan that fits; absent where none does, or where spec.resources rules the class out."""
    remark: str
    """Why it is taken, or why not."""

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names."""
        estimate = {"estimate": self.estimate.to_wire()} if self.estimate is not None else {}
        capacity = {"capacity": self.capacity} if self.capacity is not None else {}
        return {"gpuClass": self.gpu_class, **capacity, "remark": self.remark, **estimate}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """The choice for one job."""

    job: str
    facts: ModelFacts
    chosen: Estimate | None
    """The plan on the classes that exist here; absent where the job cannot run here."""
    refusal: Refusal | None
    """Why it cannot run here, and what would change it."""
    alternatives: tuple[Alternative, ...]
    """Every class, here or not, smallest first."""
    guess: str | None = None
    """Why the bytes are a guess, and how far such guesses were off; absent where they are none."""
    unseen: bool = False
    """Whether the account may not read which GPUs are here, so that nothing is said of that."""
    data: DataCount | None = None
    """What the job's data file gives; absent where it is not on this machine."""
    notes: tuple[str, ...] = ()
    """What else to know: what prepare may refuse, and what the times do not tell."""

    def _repr_html_(self) -> str:
        from orchestrator.sdk.notebook import plan_html  # which knows plans

        return plan_html(self)

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names."""
        wire: dict[str, object] = {"job": self.job, "model": self.facts.to_wire()}
        if self.chosen is not None:
            wire["chosen"] = self.chosen.to_wire()
        if self.refusal is not None:
            wire["refusal"] = {"reason": self.refusal.reason.value, "message": self.refusal.message}
        if self.guess is not None:
            wire["guess"] = self.guess
        if self.unseen:
            wire["unseen"] = True
        if self.data is not None:
            wire["data"] = self.data.to_wire()
        if self.notes:
            wire["notes"] = list(self.notes)
        return {**wire, "alternatives": [alternative.to_wire() for alternative in self.alternatives]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the service has been told and has learned, beside what its GPUs are."""

    prices: str = ""
    """Dollars an hour by class, written as the setting is."""
    table: GpuTable = BUILT_IN
    """The classes that there may be."""
    margins: Mapping[tuple[str, str], Margins] = field(default_factory=dict[tuple[str, str], Margins])
    """What finished jobs have taught, by namespace and architecture."""


def plan_job(
    job: QLoRAJob,
    facts: ModelFacts,
    classes: Sequence[GpuClass] | None,
    known: Known | None = None,
    data: DataCount | None = None,
) -> JobPlan:
    """The choice among the classes that exist, beside what every other class would mean.

    No classes but None: which classes exist may not be read, and the choice is among all.
    """
    unseen = classes is None
    known = known or Known()
    table = known.table
    classes = [table.gpu_class(name, 1) for name in table.names] if classes is None else classes
    prices, margins = known.prices, known.margins.get((job.metadata.namespace, facts.architecture), DEFAULT)
    classes = hardware.priced(classes, prices)
    work = data.work() if data is not None else None
    choice = plan_search.choose_class(job.spec, facts, classes, work=work, margins=margins)
    chosen = choice if isinstance(choice, Estimate) else None
    present = {gpu_class.name for gpu_class in classes}
    absent = hardware.priced((table.gpu_class(name, 0) for name in table.names if name not in present), prices)
    every = sorted((*classes, *absent), key=lambda gpu_class: (gpu_class.usable_bytes, gpu_class.name))
    alternatives = tuple(_alternative(job.spec, facts, gpu_class, chosen, work, margins) for gpu_class in every)
    return JobPlan(
        job=job.key,
        facts=facts,
        chosen=chosen,
        refusal=choice if isinstance(choice, Refusal) else None,
        guess=guess_words(job.spec.adapter, facts),
        alternatives=tuple(replace(each, capacity=None) for each in alternatives) if unseen else alternatives,
        unseen=unseen,
        data=data,
        notes=(
            *_few_steps(job.spec, data),
            *_notes(job.spec, facts, data),
            *_on_host(job.spec, facts, chosen, every),
            *_better(chosen, every, alternatives),
        ),
    )


def _few_steps(spec: QLoRAJobSpec, data: DataCount | None) -> Iterator[str]:
    """Prepare's own warning of few optimizer steps, where they are known."""
    if data is not None:
        yield from steps_warning(data.steps, data.sequences, spec.training)
    elif spec.training.max_steps is not None:
        yield from steps_warning(spec.training.max_steps, 0, spec.training)


def _better(chosen: Estimate | None, every: Sequence[GpuClass], alternatives: Sequence[Alternative]) -> Iterator[str]:
    """What of the classes that are here would be faster and cost less, and whose times are a guess."""
    if chosen is None:
        return
    known = {gpu_class.name: gpu_class for gpu_class in every}
    ours = known[chosen.gpu_class]
    if ours.capacity and not ours.cpu and not ours.card_known and chosen.card is not None:
        guessed = f"times are a guess, for {chosen.card}, the slowest of {ours.name}"
        yield f"{guessed}: the cards here have not told their names"
    here = [each.estimate for each in alternatives if each.capacity and each.estimate is not None]
    steps = {
        estimate.gpu_class: (estimate.step_seconds, dollars)
        for estimate in here
        if estimate.step_seconds and (dollars := _dollars_a_step(estimate, known[estimate.gpu_class]))
    }
    if ours.name not in steps:
        return
    seconds, dollars = steps[ours.name]
    for name, (other_seconds, other_dollars) in steps.items():
        if other_seconds < seconds and other_dollars < dollars:
            yield (
                f"cheaper and faster: {name}, a step in {other_seconds / seconds:.0%} of the time for "
                f"{other_dollars / dollars:.0%} of the price; ask for it: spec.resources.gpuClasses [{name}]"
            )


def _dollars_a_step(estimate: Estimate, gpu_class: GpuClass) -> float | None:
    if estimate.step_seconds is None or gpu_class.dollars_per_hour is None:
        return None
    return estimate.step_seconds * gpu_class.dollars_per_hour / 3600


def _notes(spec: QLoRAJobSpec, facts: ModelFacts, data: DataCount | None) -> Iterator[str]:
    if facts.part_of is not None:
        yield f"text part of {facts.part_of}: the image tower is not loaded, and the records are of text alone"
    if spec.adapter.experts and facts.mixture is not None:
        yield (
            f"adapters on experts: A and B for each of {facts.mixture.experts} experts of a layer; layers are "
            "computed by transformers, not by hand"
        )
    if facts.record_by_record:
        yield (
            f"record by record: records of a {facts.model_type} model are computed one at a time, not in packed rows"
            + (
                f"; the times are for records of {spec.training.sequence_length} tokens until prepare has counted "
                "them, and shorter ones take longer"
                if data is None
                else ""
            )
        )
    if facts.context_length is not None and spec.training.sequence_length > facts.context_length:
        yield (
            f"spec.training.sequenceLength is {spec.training.sequence_length}, but the model was made for "
            f"{facts.context_length} positions: prepare refuses a data set with a longer record"
        )


def _on_host(
    spec: QLoRAJobSpec, facts: ModelFacts, chosen: Estimate | None, classes: Sequence[GpuClass]
) -> Iterator[str]:
    """What layers' activations take of the host, and whether it is known that the host has it."""
    if chosen is None or not chosen.plan.offloaded_layers:
        return
    known = any(each.name == chosen.gpu_class and each.host_bytes is not None for each in classes)
    gib = offloaded_host_bytes(spec, facts, chosen.plan) / GIB
    assumed = plan_search.UNKNOWN_HOST_BYTES // GIB
    unknown = (
        f"; the machines of that class are taken to have {assumed} GiB for each GPU: with less the plan is another"
    )
    yield f"{gib:.1f} GiB of host memory hold what {chosen.plan.offloaded_layers} layers keep{'' if known else unknown}"


def undefined_words(jobs: Sequence[QLoRAJob], table: GpuTable) -> str | None:
    """A word on GPU classes that jobs name or run on and nobody has told of here; nothing where there are none."""
    named = {name for job in jobs for name in job.spec.resources.gpu_classes}
    held = {each.gpu_class for job in jobs for each in job.status.attempts if each.gpu_class is not None}
    unknown = undefined(named | held, table)
    if not unknown:
        return None
    return (
        f"GPU class {', '.join(unknown)} is not known here: if the service's operator has defined it, set "
        "QLORA_GPU_CLASS_DEFINITIONS to what the service has, or this plan leaves it out"
    )


def refuse_resources(spec: QLoRAJobSpec, classes: Sequence[GpuClass]) -> str | None:
    """Why spec.resources can never be met here, whatever the model; nothing where it can."""
    if not classes or plan_search.allowed_classes(spec, classes):
        return None
    present = ", ".join(f"{c.name} ({c.marketed_gib} GiB)" for c in classes)
    asked = [f"vram {spec.resources.vram}"] if spec.resources.vram != "auto" else []
    if spec.resources.gpu_classes:
        asked.append(f"gpuClasses {', '.join(spec.resources.gpu_classes)}")
    return (
        f"spec.resources: no GPU here offers {' with '.join(asked)}; here are {present}: ask for less, or leave it out"
    )


def _alternative(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    gpu_class: GpuClass,
    chosen: Estimate | None,
    work: Work | None,
    margins: Margins,
) -> Alternative:
    choice = plan_search.choose_class(spec, facts, (gpu_class,), work=work, margins=margins)
    estimate = choice if isinstance(choice, Estimate) else None
    if estimate is not None and chosen is not None and estimate.gpu_class == chosen.gpu_class:
        remark = "chosen"
    elif not plan_search.allowed_classes(spec, (gpu_class,)):
        remark = "ruled out by spec.resources"
    elif isinstance(choice, Refusal):
        remark = choice.message
    elif gpu_class.capacity == 0:
        remark = "fits; none here"
    else:
        remark = f"fits; {_why_not(spec, estimate, chosen)}"
    return Alternative(gpu_class=gpu_class.name, capacity=gpu_class.capacity, estimate=estimate, remark=remark)


def _why_not(spec: QLoRAJobSpec, estimate: Estimate | None, chosen: Estimate | None) -> str:
    """Why a class that is here and fits is not the chosen one."""
    if spec.resources.gpu_classes:
        return "not preferred"
    deadline_seconds = spec.active_deadline_seconds
    if deadline_seconds is not None and estimate is not None and chosen is not None:
        if not plan_search.in_time(estimate, deadline_seconds):
            return "misses activeDeadlineSeconds"
        if estimate.dollars is not None and chosen.dollars is not None and estimate.dollars > chosen.dollars:
            return "dearer"
    return "larger than needed"
