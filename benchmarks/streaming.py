"""Training with layers streamed from the host, held against the same steps with all layers on the card, on one GPU.

    python -m benchmarks.streaming --rows FILE [--questions 70b 32b 30b-a3b] [--plans 1/80/80+embeddings ...]
        [--seconds 540] [--save streaming]

A question is a model that its class of cards does not hold, with all its layers and random weights; the allocator is
capped to the class's bytes, while the model is loaded too. It is trained for some steps under the plan that is chosen
for it, and under others that `--plans` names (micro-batch/recomputed layers/streamed layers, and `+activations`), then
with all layers on the card, without a cap and else under the same plans. Losses of all steps and the adapter in the end
are compared bit for bit.

A step is bound by the longer of two times: what it takes with all layers on the card, and what the copies take at the
speed of the link, measured here with pieces as large as a layer. Rows are those of `benchmarks.sizing`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, get_args

from benchmarks import questions
from benchmarks.estimators import Row, ours
from benchmarks.report import argument_parser, card, emit

from benchmarks.sizing import GIB, Bench, Case, Group, Job  # isort: skip - sets torch's allocator up before it is loaded
import torch
from qlora_trainer.kernels.host_offload import pinned

from orchestrator.api.plan import MemoryPlan, OffloadTarget
from orchestrator.sizing import plan_search
from orchestrator.sizing.hardware import gpu_class

LINK_COPIES = 12
PLAN = re.compile(r"(\d+)/(\d+)/(\d+)(?:\+activations)?(?:\+embeddings)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question(questions.Question):
    """A job, and a class that is too small for its model."""

    sequence_length: int = 2048
    global_batch_size: int = 4

    def groups(self, others: Iterable[str]) -> Iterator[Group]:
        """The cases that stream, by how many layers, and their twins on the card."""
        on = gpu_class(self.class_name, capacity=1, products=[card()])
        chosen = plan_search.choose_plan(self.spec, self.facts, on)
        plans = [*([] if chosen is None else [chosen]), *map(self._plan, others)]
        by_streamed: dict[int, list[MemoryPlan]] = {}
        for plan in dict.fromkeys(plans):
            by_streamed.setdefault(plan.streamed_layers, []).append(plan)
        for streamed in by_streamed.values():
            yield self._group(streamed, cap_gib=on.usable_bytes / GIB)
        resident = [plan.model_copy(update={"streamed_layers": 0}) for plan in plans]
        yield self._group(dict.fromkeys(resident), cap_gib=0.0)

    def _plan(self, text: str) -> MemoryPlan:
        found = PLAN.fullmatch(text)
        assert found is not None, f"{text} is no plan"
        size, recompute, streamed = map(int, found.groups())
        return MemoryPlan(
            micro_batch_size=size,
            accumulation_steps=self.global_batch_size // size,
            recompute_layers=recompute,
            streamed_layers=streamed,
            offload=tuple(name for name in get_args(OffloadTarget) if f"+{name}" in text),
        )

    def _group(self, plans: Iterable[MemoryPlan], *, cap_gib: float) -> Group:
        spec = self.spec
        cases = tuple(Case(adapter=spec.adapter, training=spec.training, plan=plan, cap_gib=cap_gib) for plan in plans)
        return Group(model=self.model, layers=self.facts.num_layers, cases=cases, part="streamed")


QUESTIONS = {
    "70b": Question(model="llama-3.1-70b", class_name="24Gi"),
    "32b": Question(model="qwen2.5-32b", class_name="16Gi"),
    "30b-a3b": Question(model="qwen3-30b-a3b", class_name="16Gi"),
    "tiny": Question(model="tiny", class_name="16Gi", sequence_length=32),
}


class WatchedJob(Job):
    """A job of `benchmarks.sizing` that also tells what it has learned."""

    def measure(self, timed_seconds: float) -> dict[str, object]:
        """Every step's loss, and the adapter in the end."""
        self._losses: list[float] = []
        figures = super().measure(timed_seconds)
        digest = hashlib.sha256()
        for _, tensor in sorted(self._model.adapter().items()):
            digest.update(tensor.cpu().view(torch.uint8).numpy().tobytes())
        streamed = self._base.__dict__.get("streamed_layers")
        return {
            **figures,
            "losses": self._losses,
            "adapter_sha256": digest.hexdigest(),
            "host_bytes": 0 if streamed is None else streamed.host_bytes,
        }

    def _step(self) -> tuple[float, float]:
        seconds, loss = super()._step()
        self._losses.append(loss)
        return seconds, loss


class StreamingBench(Bench):
    """`benchmarks.sizing`'s, of such jobs; models are loaded under the cap of their cases, too."""

    job = WatchedJob
    loading_cap_gib = 0.0

    def run(self, group: Group) -> None:
        """Every case of a group."""
        self.loading_cap_gib = group.cases[0].cap_gib
        super().run(group)

    def _cap(self, gib: float) -> None:
        super()._cap(gib or self.loading_cap_gib)


def main() -> None:
    """Answer the questions, one after the other."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="file that gets a JSON line for every row")
    parser.add_argument("--questions", nargs="+", default=["70b", "32b", "30b-a3b"], choices=QUESTIONS)
    parser.add_argument("--plans", nargs="*", default=[], help="beside the chosen one")
    parser.add_argument("--seconds", type=float, default=540.0)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    answers: dict[str, Any] = {}
    for name in arguments.questions:
        question = QUESTIONS[name]
        before = len(arguments.rows.read_text().splitlines()) if arguments.rows.exists() else 0
        bench = StreamingBench(arguments.rows, deadline=deadline)
        for group in question.groups(arguments.plans):
            bench.run(group)
        rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()[before:]]
        layer_bytes = max(
            (row.get("host_bytes", 0) // max(1, row["plan"]["streamedLayers"]) for row in rows if "plan" in row),
            default=0,
        )
        link = link_gbps(layer_bytes) if layer_bytes else None
        answers[name] = [answer for row in rows if (answer := judged(row, rows, link))]
        print(json.dumps(answers[name]), file=sys.stderr, flush=True)
    emit(answers, save=arguments.save)


def link_gbps(count: int) -> float:
    """Gigabytes a second that pieces of so many bytes take to the card, one after the other."""
    if not torch.cuda.is_available():
        return float("inf")
    device = torch.device("cuda", 0)
    host, room = pinned(count, device, "a copy", "streamedLayers"), torch.empty(count, dtype=torch.uint8, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(LINK_COPIES + 1)]
    events[0].record()
    for event in events[1:]:
        room.copy_(host, non_blocking=True)
        event.record()
    torch.cuda.synchronize()
    milliseconds = median(one.elapsed_time(other) for one, other in pairwise(events[1:]))
    return count / milliseconds / 1e6


def judged(row: dict[str, Any], rows: list[dict[str, Any]], link: float | None) -> dict[str, Any]:
    """A case that streams against its bound, its twin and its prediction; nothing of any other row."""
    if "plan" not in row or not row["plan"]["streamedLayers"]:
        return {}
    twin = next(
        (other for other in rows if "losses" in other and other["plan"] == row["plan"] | {"streamedLayers": 0}), None
    )
    if "losses" not in row or twin is None or link is None:
        return {
            "plan": row["plan"],
            **{name: row[name] for name in ("error", "refused", "step_seconds") if name in row},
        }
    plan = MemoryPlan.model_validate(row["plan"])
    streamed = plan.streamed_layers
    copied = 2 * max(0, streamed - 2) * row["host_bytes"] // streamed * plan.accumulation_steps
    bound = max(twin["step_seconds"], copied / link / 1e9)
    steps = min(len(row["losses"]), len(twin["losses"]))
    job = Row.read(row)
    predicted = 0 if job is None else ours(job, margin=True)
    return {
        "plan": row["plan"],
        "cap_gib": row["cap_gib"],
        "link_gbps": round(link, 2),
        "host_gib": round(row["host_bytes"] / GIB, 2),
        "gib_copied": round(copied / GIB, 2),
        "step_seconds": row["step_seconds"],
        "resident_step_seconds": twin["step_seconds"],
        "copy_seconds": round(copied / link / 1e9, 4),
        "share_of_bound": round(bound / row["step_seconds"], 4),
        "steps": steps,
        "losses_equal": row["losses"][:steps] == twin["losses"][:steps],
        "adapters_equal": len(row["losses"]) == len(twin["losses"]) and row["adapter_sha256"] == twin["adapter_sha256"],
        "predicted_gib": round(predicted / GIB, 3),
        "measured_gib": round(row.get("peak_allocated_bytes", 0) / GIB, 3),
        "reserved_gib": round(row.get("peak_reserved_bytes", 0) / GIB, 3),
        "load_seconds": row["load_seconds"],
    }


if __name__ == "__main__":
    main()
