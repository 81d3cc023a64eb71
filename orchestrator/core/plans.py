"""Which memory plan a job runs under, and on which GPU class.

Every plan learns the same thing: the global batch is fixed, and a plan only says how it is split and what is
computed twice. Among the plans that fit a class the fastest is taken; among the classes the smallest that fits and
that spec.resources allows. `core/schedule` and the `plan` command are the callers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, QLoRAJobSpec, ResourcesSpec, TrainingSpec
from orchestrator.api.plan import Estimate, MemoryPlan
from orchestrator.api.reasons import Reason
from orchestrator.api.results import ModelFacts
from orchestrator.core.facts import GpuClass, Refusal
from orchestrator.core.gpus import GIB
from orchestrator.core.sizing import estimate, peak_bytes

LOSS_CHUNK_TOKENS = 1024
MAX_MICRO_BATCH_SIZE = 64
ANSWERS_KEPT = 4096
SHORTEST_SEQUENCE = 16  # the contract's lower bound on training.sequenceLength


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a micro-step costs, in the time that one token takes without recompute."""

    floor_tokens: int
    """A micro-step takes at least as long as so many tokens: launches and dequantization, not arithmetic."""
    overhead_tokens: int
    """On top of the tokens themselves, for every micro-step."""
    enough_tokens: int
    """Beyond so many tokens a larger micro-batch gains nothing."""


# Measured on H200 and H100 (8B and 13B, one to four sequences of 2,048): below 2,000 to 4,000 tokens a micro-step takes
# the same time whatever the model; recompute costs a third.
GPU_PACE = Pace(floor_tokens=4096, overhead_tokens=1024, enough_tokens=8192)
# Without launches to hide, a CPU only has the dequantization of every matrix to spread over the tokens.
CPU_PACE = Pace(floor_tokens=256, overhead_tokens=64, enough_tokens=512)
RECOMPUTE_COST = 1 / 3


def choose_class(
    spec: QLoRAJobSpec, facts: ModelFacts, classes: Sequence[GpuClass], *, steps: int = 0
) -> Estimate | Refusal:
    """The best class for the job and the fastest plan that fits it."""
    found = candidates(spec, facts, classes, steps=steps)
    return found if isinstance(found, Refusal) else found[0]


def candidates(
    spec: QLoRAJobSpec, facts: ModelFacts, classes: Sequence[GpuClass], *, steps: int = 0
) -> tuple[Estimate, ...] | Refusal:
    """Every class that the job may use and fits, the preferred first, each with its fastest plan."""
    question = _Question(
        adapter=spec.adapter,
        training=spec.training,
        resources=spec.resources,
        facts=facts,
        classes=tuple(classes),
        steps=steps,
    )
    return _answer(question)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """All that the answer depends on; a waiting job asks in every pass, and jobs alike ask alike."""

    adapter: AdapterSpec
    training: TrainingSpec
    resources: ResourcesSpec
    facts: ModelFacts
    classes: tuple[GpuClass, ...]
    steps: int


@lru_cache(maxsize=ANSWERS_KEPT)
def _answer(question: _Question) -> tuple[Estimate, ...] | Refusal:
    spec, facts = _spec_of(question), question.facts
    allowed = allowed_classes(spec, question.classes)
    if not allowed:
        return _nothing_allowed(spec, question.classes)
    chosen = ((gpu_class, choose_plan(spec, facts, gpu_class)) for gpu_class in allowed)
    fitting = tuple(
        estimate(spec, facts, plan, gpu_class, steps=question.steps) for gpu_class, plan in chosen if plan is not None
    )
    return fitting or _does_not_fit(spec, facts, max(allowed, key=_size))


def _spec_of(question: _Question) -> QLoRAJobSpec:
    """A spec that is the same to sizing, which looks at neither model source nor data."""
    nowhere = "file:///"
    return QLoRAJobSpec(
        model=ModelSource(source=nowhere),
        dataset=DatasetSource(source=nowhere),
        adapter=question.adapter,
        training=question.training,
        resources=question.resources,
    )


def allowed_classes(spec: QLoRAJobSpec, classes: Sequence[GpuClass]) -> tuple[GpuClass, ...]:
    """The classes that spec.resources allows: in its order of preference, otherwise the smallest first."""
    wanted = spec.resources.gpu_classes
    large_enough = [c for c in classes if c.marketed_gib >= _asked_gib(spec)]
    if not wanted:
        return tuple(sorted(large_enough, key=_size))
    rank = {name: index for index, name in enumerate(wanted)}
    return tuple(sorted((c for c in large_enough if c.name in rank), key=lambda c: rank[c.name]))


def choose_plan(spec: QLoRAJobSpec, facts: ModelFacts, gpu_class: GpuClass) -> MemoryPlan | None:
    """The fastest plan that fits the class; None where even the thriftiest does not."""
    return next(iter(plans(spec, facts, gpu_class)), None)


def plans(spec: QLoRAJobSpec, facts: ModelFacts, gpu_class: GpuClass) -> tuple[MemoryPlan, ...]:
    """The plans that fit the class, fastest first: for each micro-batch the one that recomputes least."""
    pace = CPU_PACE if gpu_class.cpu else GPU_PACE
    fitting = (
        least_recompute(spec, facts, micro_batch_size, gpu_class)
        for micro_batch_size in micro_batch_sizes(spec.training.global_batch_size)
    )
    return tuple(
        sorted(
            (plan for plan in fitting if plan is not None),
            key=lambda plan: (cost(spec, facts, plan, pace), plan.micro_batch_size),
        )
    )


def micro_batch_sizes(global_batch_size: int) -> Iterator[int]:
    """The ways to split a global batch evenly, smallest first."""
    bound = min(global_batch_size, MAX_MICRO_BATCH_SIZE)
    return (size for size in range(1, bound + 1) if global_batch_size % size == 0)


def least_recompute(
    spec: QLoRAJobSpec, facts: ModelFacts, micro_batch_size: int, gpu_class: GpuClass
) -> MemoryPlan | None:
    """The plan with this micro-batch that fits and recomputes the fewest layers.

    Each recomputed layer saves the same bytes, so the peak falls with their number and bisection finds the least.
    """

    def plan(layers: int) -> MemoryPlan:
        return MemoryPlan(
            micro_batch_size=micro_batch_size,
            accumulation_steps=spec.training.global_batch_size // micro_batch_size,
            recompute_layers=layers,
            loss_chunk_tokens=LOSS_CHUNK_TOKENS,
        )

    def fits(layers: int) -> bool:
        peak = peak_bytes(spec, facts, plan(layers), multiprocessors=gpu_class.multiprocessors)
        return peak <= gpu_class.usable_bytes

    low, high = 0, facts.num_layers
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return plan(low)


def cost(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan, pace: Pace) -> float:
    """Expected time for one token, in the time that a token takes in a large micro-step without recompute."""
    tokens = plan.micro_batch_size * spec.training.sequence_length
    recomputed = 1 + RECOMPUTE_COST * min(plan.recompute_layers, facts.num_layers) / facts.num_layers
    overhead = pace.overhead_tokens / min(tokens, pace.enough_tokens)
    return max(pace.floor_tokens / tokens, recomputed) + overhead


def thriftier(plan: MemoryPlan, num_layers: int) -> MemoryPlan | None:
    """The next plan after one that ran out of memory: recompute everything, then halve the micro-batch."""
    if plan.recompute_layers < num_layers:
        return plan.model_copy(update={"recompute_layers": num_layers})
    if plan.micro_batch_size == 1:
        return None
    global_batch_size = plan.micro_batch_size * plan.accumulation_steps
    smaller = max(size for size in micro_batch_sizes(global_batch_size) if size <= plan.micro_batch_size // 2)
    return plan.model_copy(
        update={"micro_batch_size": smaller, "accumulation_steps": global_batch_size // smaller},
    )


def step_up(spec: QLoRAJobSpec, facts: ModelFacts, failed: Estimate, classes: Sequence[GpuClass]) -> Estimate | Refusal:
    """What to run under after `failed` ran out of memory: a thriftier plan, then a larger class."""
    present = next((c for c in classes if c.name == failed.gpu_class), None)
    plan = thriftier(failed.plan, facts.num_layers)
    if plan is not None and present is not None:
        return estimate(spec, facts, plan, present, steps=failed.steps)
    larger = tuple(c for c in classes if c.usable_bytes > failed.usable_bytes)
    found = candidates(spec, facts, larger, steps=failed.steps)
    if isinstance(found, Refusal):
        return Refusal(
            reason=Reason.DOES_NOT_FIT,
            message=f"ran out of memory on {failed.gpu_class} under the thriftiest plan, and no larger class is "
            "allowed here; reduce training.sequenceLength or adapter.rank, or add a larger GPU",
        )
    return found[0]


def _size(gpu_class: GpuClass) -> tuple[int, str]:
    return gpu_class.usable_bytes, gpu_class.name


def _asked_gib(spec: QLoRAJobSpec) -> float:
    vram = spec.resources.vram
    return 0.0 if vram == "auto" else float(vram.removesuffix("Gi"))


def _nothing_allowed(spec: QLoRAJobSpec, classes: Sequence[GpuClass]) -> Refusal:
    if not classes:
        return Refusal(reason=Reason.WAITING_FOR_GPU, message="there is no GPU here; add one")
    asked = f"resources.vram {spec.resources.vram}"
    if spec.resources.gpu_classes:
        asked += f" and resources.gpuClasses {', '.join(spec.resources.gpu_classes)}"
    present = ", ".join(c.name for c in sorted(classes, key=_size))
    message = f"{asked} leaves none of the classes here ({present}); ask for less or add such a GPU"
    return Refusal(reason=Reason.DOES_NOT_FIT, message=message)


def _does_not_fit(spec: QLoRAJobSpec, facts: ModelFacts, largest: GpuClass) -> Refusal:
    thriftiest = MemoryPlan(
        micro_batch_size=1,
        accumulation_steps=spec.training.global_batch_size,
        recompute_layers=facts.num_layers,
        loss_chunk_tokens=LOSS_CHUNK_TOKENS,
    )
    needed_gib = peak_bytes(spec, facts, thriftiest, multiprocessors=largest.multiprocessors) / GIB
    length = spec.training.sequence_length
    message = (
        f"needs {needed_gib:.1f} GiB at sequenceLength {length}, and {largest.name} offers "
        f"{largest.usable_bytes / GIB:.1f} GiB"
    )
    shorter = _longest_fitting(spec, facts, largest)
    advice = (
        f"; {shorter} fits {largest.name}"
        if shorter
        else "; lower adapter.rank, use an 8-bit optimizer or a larger GPU"
    )
    return Refusal(reason=Reason.DOES_NOT_FIT, message=message + advice)


def _longest_fitting(spec: QLoRAJobSpec, facts: ModelFacts, gpu_class: GpuClass) -> int | None:
    """The longest power of two below the asked sequence length that fits."""
    length = 1 << (spec.training.sequence_length - 1).bit_length() - 1
    while length >= SHORTEST_SEQUENCE:
        training = spec.training.model_copy(update={"sequence_length": length})
        if choose_plan(spec.model_copy(update={"training": training}), facts, gpu_class) is not None:
            return length
        length //= 2
    return None
