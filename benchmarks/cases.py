"""What one measurement of training steps is of, and how it is taken: for this trainer and for others alike.

A case is SEQUENCExMICROBATCH, then `/LAYERS` that recompute (none unless given, `/all` for all), then `/LAYERS` that
have what they keep in host memory, and of these words, each behind a `+`: `activations` and `embeddings` for what is
offloaded, `kept` where layers that recompute keep what attention gave, `flash` for flash-attn-4, `remembered` for
preferences whose reference was asked before. It runs for so many repetitions of so many steps after a warm-up; a
repetition's figure is the median of its steps. Rows are random token ids, the same ones in the same order for
everybody.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median, stdev
from typing import Any, get_args

import numpy as np
import torch

from orchestrator.api.plan import MemoryPlan, OffloadTarget

ALL_LAYERS = 1024
FIRST_ORDINARY_TOKEN = 5
LONGEST_MESSAGE = 300
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one measurement is of."""

    sequence: int
    micro_batch: int
    recompute_layers: int = 0
    offloaded_layers: int = 0
    offload: tuple[OffloadTarget, ...] = ()
    kept: bool = False
    flash: bool = False
    remembered: bool = False
    """Of preferences: what the reference says is known before the first step."""
    own_plan: MemoryPlan | None = None
    """Instead of what the case's words say."""

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read `SEQUENCExMICROBATCH[/LAYERS[/LAYERS]][+word]...`."""
        plan, *words = text.split("+")
        size, _, ways = plan.partition("/")
        layers, _, offloaded = ways.partition("/")
        sequence, _, micro_batch = size.partition("x")
        known = [name for name in get_args(OffloadTarget) if name in words]
        return cls(
            sequence=int(sequence),
            micro_batch=int(micro_batch),
            recompute_layers=ALL_LAYERS if layers == "all" else int(layers or 0),
            offloaded_layers=int(offloaded or 0),
            offload=tuple(known),
            kept="kept" in words,
            flash="flash" in words,
            remembered="remembered" in words,
        )

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.sequence * self.micro_batch

    def plan(self) -> MemoryPlan:
        """The memory plan, of one micro-batch a step unless it is the case's own."""
        if self.own_plan is not None:
            return self.own_plan
        return MemoryPlan(
            micro_batch_size=self.micro_batch,
            accumulation_steps=1,
            recompute_layers=self.recompute_layers,
            keep_attention=self.kept,
            attention="flash-attn-4" if self.flash else "own",
            offload=self.offload,
            offloaded_layers=self.offloaded_layers,
        )

    def rows(self, vocabulary: int) -> Iterator[np.ndarray]:
        """Token ids [rows, tokens] of one micro-batch after the other."""
        random = np.random.RandomState(0)
        while True:
            yield random.randint(FIRST_ORDINARY_TOKEN, vocabulary, (self.micro_batch, self.sequence), dtype=np.int32)


def measured(case: Case, step: Callable[[], float], settings: Namespace) -> dict[str, Any]:
    """Tokens a second of a case; `step` takes one step and tells its seconds."""
    warm_up = [round(step(), 3) for _ in range(settings.warm_up)]
    rates = [case.tokens / median(step() for _ in range(settings.steps)) for _ in range(settings.repetitions)]
    speed = median(rates)
    return {
        "tokens_per_second": round(speed, 1),
        "tokens_per_second_spread": round(stdev(rates), 1) if len(rates) > 1 else 0.0,
        "step_seconds": round(case.tokens / speed, 4),
        "warm_up_seconds": warm_up,
    }


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds; where it fails, why, so that other cases still get their turn."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - others' code raises what it likes
        message = str(error).split(". GPU")[0]
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in message.lower()
        name = "out_of_memory" if out_of_memory else "error"
        return {name: f"{type(error).__name__}: {message[:LONGEST_MESSAGE]}", **peaks()}


def start_afresh(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Nothing is left on the card of the case before."""
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """The most memory in use since `start_afresh`."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def cap_memory(gib: float) -> None:
    """Let torch's allocator have no more than this of the card; 0 is no cap."""
    if gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
