"""Which memory plan a job runs under, and on which GPU class.

Every plan learns the same thing: the global batch is fixed, and a plan only says how it is split, what is computed
twice and what waits in host memory. Among the plans that fit a class the fastest is taken (`sizing/step_time`); among
the classes the smallest that fits and that spec.resources allows, or the cheapest that makes the job's deadline. Only
where no class that is allowed holds all layers are some streamed from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import product
from operator import itemgetter
from typing import NamedTuple, cast

from orchestrator.api import trainer_facts
from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.job import (
    DatasetSource,
    EvaluationSpec,
    GenerationSpec,
    ModelSource,
    ObjectiveSpec,
    QLoRAJobSpec,
    TrainingSpec,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import AttentionKernels, ByteItem, Estimate, MemoryPlan, OffloadTarget
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.sizing import hardware
from orchestrator.sizing.answering import answering_seconds
from orchestrator.sizing.footprint import Footprint, can_stream, card_matters, is_fused, moves_layers
from orchestrator.sizing.guess import guess_words
from orchestrator.sizing.hardware import GIB, Card, GpuClass
from orchestrator.sizing.margins import DEFAULT, Margins
from orchestrator.sizing.memoized import memoized
from orchestrator.sizing.memory.attention import alike
from orchestrator.sizing.memory.handwritten_layer import family_of
from orchestrator.sizing.step_time import StepTime, Work, ordering_card

LOSS_CHUNK_TOKENS = 1024
MAX_MICRO_BATCH_SIZE = 64
RESULTS_KEPT = 1536
JOBS_KEPT = 8
"""Jobs whose plans are kept: a job's questions follow each other, and more would only be garbage to collect."""
SHORTEST_SEQUENCE = 16  # the contract's lower bound on training.sequenceLength
SHORTER_SEQUENCES = 16
"""A job that fits nothing is told the longest sequence that would fit, in such parts of what it asked for."""
NONE = -1
"""Layers that need not recompute, where a plan does not fit even if all do."""
HOLES_AT_MOST = 0.05
"""Share of a peak that the allocator has reserved beside it and cannot use, free blocks that no tensor fits.
`sizing/memory/fragmentation` tells it job by job, but not in milliseconds; over jobs of all kinds that fill a card it
finds 0 to 9 %, and more than this in one of twenty, for which the out-of-memory ladder is there."""
KEPT_RECORD_TOKENS = 4096
"""How long records have to be for layers that recompute to keep what attention gave: below, attention costs little."""
STREAMED_CHOICES = 4
"""How many numbers of streamed layers are tried, from as few as fit to all: the more, the fewer have to recompute."""
HOST_SHARE = 0.5
"""Of the host's memory for each GPU, what layers' activations may take: the process, what else waits there, and other
pods need the rest."""
UNKNOWN_HOST_BYTES = 64 * GIB
"""What a machine is taken to have of memory for each GPU where nobody tells: many of those with one card have it."""
AS_FAST_FOR_LESS = 1.02
"""Plans whose layers' activations wait in host memory are alike within this: the least of that memory decides."""
AS_FAST = 1.02
"""Plans that are within this of the fastest imaginable one are alike: the smaller micro-batch takes less memory."""


def choose_class(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass],
    *,
    work: Work | None = None,
    margins: Margins = DEFAULT,
) -> Estimate | Refusal:
    """The best class for the job and the fastest plan that fits it."""
    found = candidates(spec, facts, classes, work=work, margins=margins)
    return found if isinstance(found, Refusal) else found[0]


def candidates(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass],
    *,
    work: Work | None = None,
    margins: Margins = DEFAULT,
) -> tuple[Estimate, ...] | Refusal:
    """Every class that the job may use and fits, the preferred first, each with its fastest plan."""
    job, resources = _Job.of(spec, facts, work, margins), spec.resources
    return _candidates(job, resources.vram, resources.gpu_classes, spec.active_deadline_seconds, tuple(classes))


_OF_ADAPTER = tuple(name for name in AdapterSpec.model_fields if name != "start")
_OF_OBJECTIVE = tuple(ObjectiveSpec.model_fields)
_OF_TRAINING = tuple(name for name in TrainingSpec.model_fields if name != "objective")
_Values = Callable[[Mapping[str, object]], tuple[object, ...]]
_adapter_values = cast("_Values", itemgetter(*_OF_ADAPTER))
_objective_values = cast("_Values", itemgetter(*_OF_OBJECTIVE))
_training_values = cast("_Values", itemgetter(*_OF_TRAINING))


class _Job(NamedTuple):
    """All that bytes and seconds depend on: neither model source nor data. Jobs alike ask alike.

    Ten thousand ask in one decision. Pydantic compares and hashes in Python, so what jobs differ in most is here value
    by value, in the order of the fields.
    """

    adapter: tuple[object, ...]
    training: tuple[object, ...]
    objective: tuple[object, ...]
    generation: GenerationSpec | None
    facts: ModelFacts
    work: Work
    margins: Margins

    @classmethod
    def of(cls, spec: QLoRAJobSpec, facts: ModelFacts, work: Work | None, margins: Margins = DEFAULT) -> _Job:
        """Of a job's spec."""
        training = spec.training
        return cls(
            _adapter_values(vars(spec.adapter)),
            _training_values(vars(training)),
            _objective_values(vars(training.objective)),
            spec.evaluation.generation,
            facts,
            work or Work(steps=training.max_steps or 0),
            margins,
        )

    def spec(self) -> QLoRAJobSpec:
        """One that is the same to sizing."""
        nowhere = "file:///"
        objective = ObjectiveSpec.model_validate(dict(zip(_OF_OBJECTIVE, self.objective, strict=True)))
        training = dict(zip(_OF_TRAINING, self.training, strict=True))
        return QLoRAJobSpec(
            model=ModelSource(source=nowhere),
            dataset=DatasetSource(
                source=nowhere,
                eval_source=nowhere,
                format="messages" if objective.type == "sft" else "preference",
            ),
            adapter=AdapterSpec.model_validate(dict(zip(_OF_ADAPTER, self.adapter, strict=True))),
            training=TrainingSpec.model_validate({**training, "objective": objective}),
            evaluation=EvaluationSpec(generation=self.generation),
        )


@memoized(RESULTS_KEPT)
def _candidates(
    job: _Job, vram: str, wanted: tuple[str, ...], deadline_seconds: int | None, classes: tuple[GpuClass, ...]
) -> tuple[Estimate, ...] | Refusal:
    allowed = _allowed(vram, wanted, classes)
    if not allowed:
        return _nothing_allowed(vram, wanted, classes)
    search = _search(job)
    fitting = _fitting(search, allowed, search.choose) or _fitting(search, allowed, search.choose_streaming)
    if not fitting:
        return _does_not_fit(search, max(allowed, key=_size))
    if deadline_seconds is None or wanted or all(each.dollars is None for each in fitting):
        return fitting
    return tuple(sorted(fitting, key=lambda estimate: _price_in_time(estimate, deadline_seconds)))


def _fitting(
    search: _Search, allowed: tuple[GpuClass, ...], choose: Callable[[GpuClass], MemoryPlan | None]
) -> tuple[Estimate, ...]:
    chosen = ((gpu_class, choose(gpu_class)) for gpu_class in allowed)
    return _sharing_items(search.estimate(plan, gpu_class) for gpu_class, plan in chosen if plan is not None)


def _sharing_items(estimates: Iterable[Estimate]) -> tuple[Estimate, ...]:
    """The estimates, with one object for equal items: thousands of results are kept, and most of a result is items."""
    known: dict[ByteItem, ByteItem] = {}
    return tuple(
        each.model_copy(update={"items": tuple(known.setdefault(item, item) for item in each.items)})
        for each in estimates
    )


def _price_in_time(estimate: Estimate, deadline_seconds: int) -> tuple[bool, float]:
    """What makes the deadline comes first, the cheapest before others; the rest stays in its order."""
    if not in_time(estimate, deadline_seconds):
        return True, 0.0
    return False, estimate.dollars if estimate.dollars is not None else float("inf")


def in_time(estimate: Estimate, deadline_seconds: int) -> bool:
    """Whether the steps are expected to end before the deadline."""
    return estimate.seconds is not None and estimate.seconds + (estimate.answering_seconds or 0) <= deadline_seconds


def allowed_classes(spec: QLoRAJobSpec, classes: Sequence[GpuClass]) -> tuple[GpuClass, ...]:
    """The classes that spec.resources allows: in its order of preference, otherwise the smallest first."""
    return _allowed(spec.resources.vram, spec.resources.gpu_classes, classes)


def _allowed(vram: str, wanted: tuple[str, ...], classes: Sequence[GpuClass]) -> tuple[GpuClass, ...]:
    large_enough = [c for c in classes if c.marketed_gib >= _asked_gib(vram)]
    if not wanted:
        return tuple(sorted(large_enough, key=_size))
    rank = {name: index for index, name in enumerate(wanted)}
    return tuple(sorted((c for c in large_enough if c.name in rank), key=lambda c: rank[c.name]))


def choose_plan(
    spec: QLoRAJobSpec, facts: ModelFacts, gpu_class: GpuClass, *, work: Work | None = None
) -> MemoryPlan | None:
    """The fastest plan that fits the class; None where even the one that takes least does not."""
    return next(plans(spec, facts, gpu_class, work=work), None)


def plans(
    spec: QLoRAJobSpec, facts: ModelFacts, gpu_class: GpuClass, *, work: Work | None = None
) -> Iterator[MemoryPlan]:
    """The plans that fit the class, fastest first: of each split and way the one that recomputes least."""
    search = _search(_Job.of(spec, facts, work))
    if search.choose(gpu_class) is None:
        return search.streaming(gpu_class)
    return search.fastest_first(gpu_class)


def estimate(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    plan: MemoryPlan,
    gpu_class: GpuClass,
    *,
    work: Work | None = None,
    margins: Margins = DEFAULT,
) -> Estimate:
    """A plan's peak held against what a class offers, its time, and its price."""
    return _search(_Job.of(spec, facts, work, margins)).estimate(plan, gpu_class)


def micro_batch_sizes(global_batch_size: int) -> Iterator[int]:
    """The ways to split a global batch evenly, smallest first."""
    bound = min(global_batch_size, MAX_MICRO_BATCH_SIZE)
    return (size for size in range(1, bound + 1) if global_batch_size % size == 0)


class Way(NamedTuple):
    """How a plan spends memory, but for the micro-batch and how many layers recompute."""

    offload: tuple[OffloadTarget, ...]
    attention: AttentionKernels
    keep_attention: bool
    streamed_layers: int = 0
    offloaded_layers: int = 0


class _Search:
    """One job's plans. What does not depend on the class is worked out once for all classes."""

    def __init__(self, job: _Job) -> None:
        self.spec = job.spec()
        self.facts = job.facts
        self.margins = job.margins
        self._steps = job.work.steps
        self._step_time = StepTime(self.spec, job.facts, job.work)
        self.sizes = tuple(micro_batch_sizes(self.spec.training.global_batch_size))
        self._offloads = offloads(self.spec, job.facts)
        self._fused = is_fused(self.spec.adapter, job.facts)
        self._card_matters = card_matters(self.spec.adapter, job.facts)
        self._footprints: dict[tuple[MemoryPlan, int], Footprint] = {}
        self._plans: dict[tuple[int, Way, int], MemoryPlan] = {}
        self._seconds: dict[tuple[MemoryPlan, Card], float] = {}

    def choose(self, gpu_class: GpuClass) -> MemoryPlan | None:
        """The fastest plan that fits."""
        return next(self.fastest_first(gpu_class), None)

    def choose_streaming(self, gpu_class: GpuClass) -> MemoryPlan | None:
        """The fastest plan that fits with layers on the host."""
        return next(self.streaming(gpu_class), None)

    def streaming(self, gpu_class: GpuClass) -> Iterator[MemoryPlan]:
        """The plans that fit with layers on the host, fastest first; of those alike, what takes least of the host."""
        if not self._can_stream(gpu_class):
            return
        card = ordering_card(gpu_class)
        for room_bytes in (int(gpu_class.usable_bytes / (1 + HOLES_AT_MOST)), gpu_class.usable_bytes):
            found = [*self._streaming_into(room_bytes, gpu_class)]
            if found:
                alike_seconds = AS_FAST * min(self.step_seconds(plan, card) for plan in found)
                yield from sorted(
                    found,
                    key=lambda plan: (
                        max(self.step_seconds(plan, card), alike_seconds),
                        plan.streamed_layers,
                        plan.micro_batch_size,
                    ),
                )
                return

    def _can_stream(self, gpu_class: GpuClass) -> bool:
        return not gpu_class.cpu and can_stream(self.spec, self.facts)

    def _streaming_into(self, room_bytes: int, gpu_class: GpuClass) -> Iterator[MemoryPlan]:
        layers = self.facts.num_layers
        fastest, *others = self.ways(gpu_class)
        ways = [fastest, *(way for way in others if way.attention == fastest.attention)]
        for size, way in product(self.sizes, ways):
            least = self._least_streamed(size, way, gpu_class, room_bytes)
            if least is None:
                continue
            for part in range(STREAMED_CHOICES):
                streamed = least + (layers - least) * part // (STREAMED_CHOICES - 1)
                plan = self.least_recompute(size, way._replace(streamed_layers=streamed), gpu_class, room_bytes)
                if plan is not None:
                    yield plan

    def _least_streamed(self, size: int, way: Way, gpu_class: GpuClass, room_bytes: int) -> int | None:
        """How few layers may be streamed where all recompute; None where it does not fit even if all are."""
        layers = self.facts.num_layers
        peaks = [
            self._footprint(self.plan(size, way._replace(streamed_layers=count)), gpu_class).peak_bytes(layers)
            for count in (layers, layers - 1)
        ]
        if peaks[0] > room_bytes:
            return None
        return max(1, layers - (room_bytes - peaks[0]) // max(1, peaks[1] - peaks[0]))

    def fastest_first(self, gpu_class: GpuClass) -> Iterator[MemoryPlan]:
        """The plans that fit beside the allocator's holes; where there is none, those that fit if holes stay small."""
        for room_bytes in (int(gpu_class.usable_bytes / (1 + HOLES_AT_MOST)), gpu_class.usable_bytes):
            found = iter(_FastestFirst(self, gpu_class, room_bytes))
            fastest = next(found, None)
            if fastest is not None:
                yield from self._offloading(fastest, gpu_class, room_bytes)
                yield fastest
                yield from found
                return

    def _offloading(self, rival: MemoryPlan, gpu_class: GpuClass, room_bytes: int) -> list[MemoryPlan]:
        """The plans whose layers have what they keep in host memory, instead of computing it again, and are faster than
        the fastest of the others, the fastest first; of those alike, what takes least of the host.
        """
        if not rival.recompute_layers or gpu_class.cpu or not moves_layers(self.spec.adapter, self.facts):
            return []
        card = ordering_card(gpu_class)
        limit = self.step_seconds(rival, card) / AS_FAST
        found: list[MemoryPlan] = []
        for size in self.sizes:
            plan = self._most_offloaded(size, rival, limit, gpu_class, room_bytes)
            if plan is not None and self.step_seconds(plan, card) < limit:
                found.append(plan)
                limit = min(limit, AS_FAST_FOR_LESS * self.step_seconds(plan, card))
        alike_seconds = AS_FAST_FOR_LESS * min((self.step_seconds(plan, card) for plan in found), default=0.0)
        return sorted(
            found,
            key=lambda plan: (
                max(self.step_seconds(plan, card), alike_seconds),
                plan.offloaded_layers * plan.micro_batch_size,
            ),
        )

    def _most_offloaded(
        self, size: int, rival: MemoryPlan, limit_seconds: float, gpu_class: GpuClass, room_bytes: int
    ) -> MemoryPlan | None:
        """The plan of so large micro-batches that offloads as many layers as pays.

        What takes longer than the limit even if nothing recomputes is not worked out.
        """
        card = ordering_card(gpu_class)
        offload: tuple[OffloadTarget, ...] = ("embeddings",) if "embeddings" in self._offloads[-1] else ()
        way = Way(offload, rival.attention, rival.keep_attention)
        whole = self.plan(size, way)
        seconds = self.step_seconds(whole, card)
        count = self._pays_most(size, way, gpu_class) if seconds < limit_seconds else 0
        if not count:
            return None
        for each in (offload, self._offloads[-1]):  # inputs stay if they may: the link has enough to carry
            offloading = way._replace(offload=each, offloaded_layers=count)
            plan = self.least_recompute(size, offloading, gpu_class, room_bytes)
            if plan is not None:
                return plan if plan.recompute_layers else self._fewest_offloaded(plan, gpu_class, room_bytes)
        return None

    def _pays_most(self, size: int, way: Way, gpu_class: GpuClass) -> int:
        """How many layers to offload: as close together as the card waits for none, or one closer, if that pays."""
        card, others = ordering_card(gpu_class), self.facts.num_layers - 1
        host_bytes = UNKNOWN_HOST_BYTES if gpu_class.host_bytes is None else gpu_class.host_bytes
        most = int(HOST_SHARE * host_bytes) // self._step_time.kept_layer_bytes(size)
        whole = self.plan(size, way)
        apart = self._step_time.layers_apart(whole, card)
        again = self.step_seconds(self.plan(size, way, 1), card) - self.step_seconds(whole, card)

        def costs(count: int) -> float:
            offloading = self.plan(size, way._replace(offloaded_layers=count))
            return self.step_seconds(offloading, card) - count * again  # that are not computed again

        return min((min(most, others // each) for each in (apart, apart - 1) if each), key=costs)

    def _fewest_offloaded(self, plan: MemoryPlan, gpu_class: GpuClass, room_bytes: int) -> MemoryPlan:
        """Of a plan that recomputes nothing: there may be room for the activations of more layers on the card."""
        found = self._footprint(plan, gpu_class)
        room_layers = int((room_bytes - found.peak_bytes(0)) / (found.kept_layer_bytes * (1 + HOLES_AT_MOST)))
        return plan.model_copy(update={"offloaded_layers": max(1, plan.offloaded_layers - room_layers)})

    def ways(self, gpu_class: GpuClass) -> tuple[Way, ...]:
        """The fastest first, where nothing has to recompute; a CPU has no other memory to move things to."""
        offloads = self._offloads[:1] if gpu_class.cpu else self._offloads
        kept = (True, False) if self._fused and self._step_time.record_tokens >= KEPT_RECORD_TOKENS else (False,)
        kernels: tuple[AttentionKernels, ...] = ("flash-attn-4", "own") if self._flash_pays(gpu_class) else ("own",)
        return tuple(Way(offload, each, keep) for each in kernels for offload in offloads for keep in kept)

    def _flash_pays(self, gpu_class: GpuClass) -> bool:
        """Whether the trainer has flash-attn-4, and is faster with it on the class's cards."""
        card = gpu_class.card
        if not self.facts.flash_attention or not self._fused or card is None or card.flash4_share is None:
            return False
        if self._step_time.record_tokens < trainer_facts.FLASH_RECORD_TOKENS:
            return False
        plans = (self.plan(1, Way((), kernels, False)) for kernels in ("flash-attn-4", "own"))
        with_it, own = (self._step_time.parts(plan, card)["attention"] for plan in plans)
        return with_it < own

    def plan(self, micro_batch_size: int, way: Way, recompute_layers: int = 0) -> MemoryPlan:
        """The plan that splits, spends memory and recomputes so."""
        key = micro_batch_size, way, recompute_layers
        if key not in self._plans:
            self._plans[key] = MemoryPlan(
                micro_batch_size=micro_batch_size,
                accumulation_steps=self.spec.training.global_batch_size // micro_batch_size,
                recompute_layers=recompute_layers,
                keep_attention=way.keep_attention,
                attention=way.attention,
                offload=way.offload,
                offloaded_layers=way.offloaded_layers,
                streamed_layers=way.streamed_layers,
                loss_chunk_tokens=LOSS_CHUNK_TOKENS,
            )
        return self._plans[key]

    def step_seconds(self, plan: MemoryPlan, card: Card) -> float:
        """One optimizer step."""
        key = plan, card
        if key not in self._seconds:
            self._seconds[key] = self._step_time.step_seconds(plan, card)
        return self._seconds[key]

    def least_recompute(self, size: int, way: Way, gpu_class: GpuClass, room_bytes: int) -> MemoryPlan | None:
        """The plan with the fewest recomputed layers that fits."""
        footprint = self._footprint(self.plan(size, way), gpu_class)
        layers = footprint.least_recompute(room_bytes)
        if layers is None:
            return None
        return self.plan(size, way if layers else way._replace(keep_attention=False), layers)

    def least_bytes(self, gpu_class: GpuClass, *, streaming: bool = True) -> int:
        """The peak of the plan that takes least; without `streaming`, of those that have all layers on the card."""
        streamed = self.facts.num_layers if streaming and self._can_stream(gpu_class) else 0
        ways = (way for way in self.ways(gpu_class) if way.attention == "own" and not way.keep_attention)
        plans = (self.plan(1, way._replace(streamed_layers=streamed)) for way in ways)
        return min(self._footprint(plan, gpu_class).peak_bytes(self.facts.num_layers) for plan in plans)

    def estimate(self, plan: MemoryPlan, gpu_class: GpuClass) -> Estimate:
        """The plan on the class, item by item."""
        footprint = self._footprint(plan.model_copy(update={"recompute_layers": 0}), gpu_class)
        items = footprint.items(plan.recompute_layers)
        card = gpu_class.card
        step_seconds = self._step_time.step_seconds(plan, card) if card is not None else None
        seconds = step_seconds * self._steps if step_seconds is not None and self._steps else None
        price = gpu_class.dollars_per_hour
        return Estimate(
            gpu_class=gpu_class.name,
            plan=plan,
            items=items,
            peak_bytes=sum(item.bytes for item in items),
            usable_bytes=gpu_class.usable_bytes,
            steps=self._steps,
            card=card.name if card is not None else None,
            step_seconds=step_seconds,
            seconds=seconds,
            answering_seconds=self._answering_seconds(card),
            dollars=seconds / 3600 * price if seconds is not None and price is not None else None,
        )

    def _answering_seconds(self, card: Card | None) -> float | None:
        generation = self.spec.evaluation.generation
        if generation is None or card is None:
            return None
        return answering_seconds(generation, self.facts, self.spec.training.sequence_length, card)

    def _footprint(self, plan: MemoryPlan, gpu_class: GpuClass) -> Footprint:
        """The bytes of a plan that recomputes nothing, and of all that differ from it in that alone."""
        multiprocessors = alike(gpu_class.multiprocessors, self.facts.num_attention_heads) if self._card_matters else 1
        key = plan, multiprocessors
        if key not in self._footprints:
            self._footprints[key] = Footprint(
                self.spec, self.facts, plan, multiprocessors=multiprocessors, margins=self.margins
            )
        return self._footprints[key]


class _Waiting(NamedTuple):
    """A plan in the queue of `_FastestFirst`; the first fields put it in order."""

    seconds: float
    micro_batch_size: int
    way: int
    """Its number among those of the search."""
    fitted: bool
    """Whether it recomputes as few layers as fit, or as few as might."""
    plan: MemoryPlan


class _FastestFirst:
    """The plans of a job that fit into the room on a class, fastest first, each fitted only when its turn comes.

    Until then a plan counts as if it recomputed as little as what is known of smaller micro-batches allows. Nothing
    is offloaded where all of it fits as it is.
    """

    def __init__(self, search: _Search, gpu_class: GpuClass, room_bytes: int) -> None:
        self._search = search
        self._layers = search.facts.num_layers
        self._gpu_class = gpu_class
        self._room_bytes = room_bytes
        self._card = ordering_card(gpu_class)
        self._ways = search.ways(gpu_class)
        fastest = min(search.step_seconds(search.plan(size, self._ways[0]), self._card) for size in search.sizes)
        self._alike_seconds = AS_FAST * fastest
        self._queue: list[_Waiting] = []
        self._known: dict[int, tuple[int, int]] = {}
        """A micro-batch size and the layers that need not recompute there, for each way."""

    def __iter__(self) -> Iterator[MemoryPlan]:
        for size in self._search.sizes:
            self._wait(self._search.plan(size, self._ways[0]), 0, fitted=False)
        while self._queue:
            waiting = heappop(self._queue)
            if waiting.fitted:
                yield waiting.plan
            else:
                self._fit(waiting)

    def _wait(self, plan: MemoryPlan, way: int, *, fitted: bool) -> None:
        seconds = max(self._search.step_seconds(plan, self._card), self._alike_seconds)
        heappush(self._queue, _Waiting(seconds, plan.micro_batch_size, way, fitted, plan))

    def _fit(self, waiting: _Waiting) -> None:
        """Queue a plan again with as few recomputed layers as fit, and the next way beside it."""
        size, way = waiting.micro_batch_size, waiting.way
        most_kept = self._most_kept(size, self._known.get(way))
        if 0 <= most_kept < self._layers - waiting.plan.recompute_layers:
            self._wait(self._search.plan(size, self._ways[way], self._layers - most_kept), way, fitted=False)
            return
        fitting = self._fitting(size, way) if most_kept >= 0 else None
        if fitting is not None:
            self._wait(fitting, way, fitted=True)
        elif not self._known and self._search.least_bytes(self._gpu_class, streaming=False) > self._room_bytes:
            self._queue.clear()  # nothing will fit
            return
        self._known[way] = size, self._layers - fitting.recompute_layers if fitting is not None else NONE
        if way + 1 < len(self._ways) and (fitting is None or fitting.recompute_layers):
            self._wait(self._search.plan(size, self._ways[way + 1]), way + 1, fitted=False)

    def _fitting(self, size: int, way: int) -> MemoryPlan | None:
        return self._search.least_recompute(size, self._ways[way], self._gpu_class, self._room_bytes)

    def _most_kept(self, size: int, known: tuple[int, int] | None) -> int:
        """How many layers can do without recomputation at most; NONE where the plan does not fit at all.

        What a layer keeps grows with the micro-batch, and the room for it does not.
        """
        if known is None or known[0] > size:
            return self._layers
        smaller, kept = known
        return NONE if kept == NONE else min(self._layers, (kept + 1) * smaller // size)


@lru_cache(maxsize=JOBS_KEPT)
def _search(job: _Job) -> _Search:
    return _Search(job)


def offloads(spec: QLoRAJobSpec, facts: ModelFacts) -> tuple[tuple[OffloadTarget, ...], ...]:
    """What the trainer can keep in host memory, the cheapest first.

    Embeddings that the head does not share are hardly missed on the card; layers' inputs can go out where the trainer
    computes the layers itself.
    """
    known = facts.model_type in trainer_facts.HANDWRITTEN_TYPES and not facts.tied_embeddings
    leave = known and not family_of(facts.model_type).table_scales
    embeddings: tuple[OffloadTarget, ...] = ("embeddings",) if leave else ()
    activations: tuple[OffloadTarget, ...] = ("activations",) if is_fused(spec.adapter, facts) else ()
    return tuple(dict.fromkeys(((), embeddings, (*activations, *embeddings))))


def fallback_plan(
    spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan, *, offload: bool = True
) -> MemoryPlan | None:
    """What to try once a plan ran out of memory: recompute everything, offload everything, halve the micro-batch.

    Where layers are streamed, all of them are before that.
    """
    if plan.recompute_layers < facts.num_layers or plan.keep_attention or plan.attention != "own":
        most = {"recompute_layers": facts.num_layers, "offloaded_layers": 0}
        return plan.model_copy(update={**most, "keep_attention": False, "attention": "own"})
    everything = offloads(spec, facts)[-1] if offload else ()
    if not set(everything) <= set(plan.offload):
        return plan.model_copy(update={"offload": everything})
    if 0 < plan.streamed_layers < facts.num_layers:
        return plan.model_copy(update={"streamed_layers": facts.num_layers})
    if plan.micro_batch_size == 1:
        return None
    global_batch_size = plan.micro_batch_size * plan.accumulation_steps
    smaller = max(size for size in micro_batch_sizes(global_batch_size) if size <= plan.micro_batch_size // 2)
    return plan.model_copy(
        update={"micro_batch_size": smaller, "accumulation_steps": global_batch_size // smaller},
    )


def escalate(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    failed: Estimate,
    classes: Sequence[GpuClass],
    *,
    work: Work | None = None,
    margins: Margins = DEFAULT,
) -> Estimate | Refusal:
    """What to run under after `failed` ran out of memory: a fallback_plan plan, then a larger class."""
    present = next((c for c in classes if c.name == failed.gpu_class), None)
    if present is not None:
        plan = fallback_plan(spec, facts, failed.plan, offload=not present.cpu)
        if plan is not None:
            return estimate(spec, facts, plan, present, work=work, margins=margins)
    larger = tuple(c for c in classes if c.usable_bytes > failed.usable_bytes)
    found = candidates(spec, facts, larger, work=work, margins=margins)
    if isinstance(found, Refusal):
        return Refusal(
            reason=Reason.DOES_NOT_FIT,
            message=f"ran out of memory on {failed.gpu_class} under the last fallback plan, and no larger class is "
            "allowed here; reduce training.sequenceLength or adapter.rank, or add a larger GPU",
        )
    return found[0]


def _size(gpu_class: GpuClass) -> tuple[int, str]:
    return gpu_class.usable_bytes, gpu_class.name


def _asked_gib(vram: str) -> float:
    return 0.0 if vram == "auto" else float(vram.removesuffix("Gi"))


def _nothing_allowed(vram: str, wanted: tuple[str, ...], classes: Sequence[GpuClass]) -> Refusal:
    if not classes:
        return Refusal(reason=Reason.WAITING_FOR_GPU, message="there is no GPU here; add one")
    asked = f"resources.vram {vram}"
    if wanted:
        asked += f" and resources.gpuClasses {', '.join(wanted)}"
    present = ", ".join(c.name for c in sorted(classes, key=_size))
    message = f"{asked} leaves none of the classes here ({present}); ask for less or add such a GPU"
    return Refusal(reason=Reason.DOES_NOT_FIT, message=message)


def _does_not_fit(search: _Search, largest: GpuClass) -> Refusal:
    length = search.spec.training.sequence_length
    message = (
        f"needs {search.least_bytes(largest) / GIB:.1f} GiB at sequenceLength {length}, and {largest.name} offers "
        f"{largest.usable_bytes / GIB:.1f} GiB"
    )
    if words := guess_words(search.spec.adapter, search.facts):
        message += f" (a guess: {words})"
    advice = [*_shorter(search, largest), *_larger(search, largest)]
    message += f"; {', and '.join(advice)}" if advice else "; lower adapter.rank or use an 8-bit optimizer"
    return Refusal(reason=Reason.DOES_NOT_FIT, message=message)


def _shorter(search: _Search, gpu_class: GpuClass) -> Iterator[str]:
    """The longest shorter sequence that fits."""
    training = search.spec.training
    part = max(SHORTEST_SEQUENCE, training.sequence_length // SHORTER_SEQUENCES)
    fits, too_long = 0, -(-training.sequence_length // part)
    while fits + 1 < too_long:
        middle = (fits + too_long) // 2
        shorter = training.model_copy(update={"sequence_length": middle * part})
        job = _Job.of(search.spec.model_copy(update={"training": shorter}), search.facts, Work(), search.margins)
        if _Search(job).least_bytes(gpu_class) <= gpu_class.usable_bytes:
            fits = middle
        else:
            too_long = middle
    if fits:
        yield f"sequenceLength {fits * part} fits {gpu_class.name}"


def _larger(search: _Search, present: GpuClass) -> Iterator[str]:
    """The smallest class of all that fits, here or not."""
    for name in hardware.CLASS_NAMES:
        gpu_class = hardware.gpu_class(name, capacity=0)
        too_small = gpu_class.usable_bytes <= present.usable_bytes
        if not too_small and search.least_bytes(gpu_class) <= gpu_class.usable_bytes:
            yield f"a card of class {name} takes it as it is"
            return
