"""Training with what layers keep in host memory, held against the same steps with all of it on the card, on one GPU.

    python -m benchmarks.offloading --rows FILE [--questions 13b-4096 70b-512 ...] [--seconds 540] [--save offloading]

A question is a job whose class does not hold all activations. It is trained for some steps, with the allocator capped
to the class's bytes, under the plan that is chosen for it, under the one that would be if the host had no memory to
spare, and under two that mix the ways: some layers recompute, some are offloaded, the rest stays on the card. The first
is trained without a cap, too, with all on the card; where the card is too small for that, all layers recompute instead.
Losses of all steps and the adapter in the end are compared bit for bit. Rows are those of `benchmarks.sizing`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import questions
from benchmarks.estimators import Row, ours
from benchmarks.report import argument_parser, class_here, emit

from benchmarks.sizing import GIB, Bench, Case, Group  # isort: skip - sets torch's allocator up before it is loaded
from benchmarks.streaming import WatchedJob
from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing import plan_search
from orchestrator.sizing.footprint import Footprint, offloaded_host_bytes
from orchestrator.sizing.hardware import GpuClass, gpu_class
from orchestrator.sizing.step_time import StepTime, Work, ordering_card


class Question(questions.Question):
    """A job, and a class that does not hold all that its layers keep."""

    @property
    def offered(self) -> GpuClass:
        """The class."""
        return class_here(self.class_name)

    def plans(self) -> list[MemoryPlan]:
        """The chosen one first, then the one that no host memory is needed for."""
        offered = self.offered
        chosen = plan_search.choose_plan(self.spec, self.facts, offered)
        without = plan_search.choose_plan(self.spec, self.facts, replace(offered, host_bytes=0))
        assert chosen is not None, f"{self} does not fit"
        assert without is not None, "then it does not either"
        return list(dict.fromkeys([chosen, without, *self._mixed(chosen, offered)]))

    def _mixed(self, chosen: MemoryPlan, offered: GpuClass) -> Iterator[MemoryPlan]:
        """A third of the layers recomputes, and as few are offloaded as fit; and the other way round."""
        layers = self.facts.num_layers
        for recomputing, offload in ((layers // 3, ("activations", "embeddings")), (2 * layers // 3, ())):
            base = chosen.model_copy(update={"recompute_layers": recomputing, "offload": offload})
            for offloaded in range(1, layers - recomputing):
                plan = base.model_copy(update={"offloaded_layers": offloaded})
                peak_bytes = Footprint(self.spec, self.facts, plan).peak_bytes(recomputing)
                if peak_bytes * (1 + plan_search.HOLES_AT_MOST) <= offered.usable_bytes:
                    yield plan
                    break

    def twin(self, plan: MemoryPlan) -> MemoryPlan:
        """The same steps without a plan that spares anything, or with all layers recomputed."""
        whole = plan.model_copy(update={"recompute_layers": 0, "offload": (), "offloaded_layers": 0})
        fits = Footprint(self.spec, self.facts, whole).peak_bytes(0) <= gpu_class("141Gi", 1).usable_bytes
        return whole if fits else whole.model_copy(update={"recompute_layers": self.facts.num_layers})

    def groups(self) -> Iterator[Group]:
        """The plans under the class's cap, and the chosen one's twin without."""
        plans, cap_gib = self.plans(), self.offered.usable_bytes / GIB
        cases = [*((plan, cap_gib) for plan in plans), (self.twin(plans[0]), 0.0)]
        spec = self.spec
        yield Group(
            model=self.model,
            layers=self.facts.num_layers,
            cases=tuple(Case(adapter=spec.adapter, training=spec.training, plan=p, cap_gib=cap) for p, cap in cases),
            part="offloaded",
        )


QUESTIONS = {
    "13b-4096": Question(model="llama-2-13b", sequence_length=4096, global_batch_size=4),
    "8b-8192": Question(model="llama-3.1-8b", sequence_length=8192, global_batch_size=4),
    "70b-512": Question(model="llama-3.1-70b", sequence_length=512, global_batch_size=16, class_name="48Gi"),
    "qwen3-8b-16384": Question(model="qwen3-8b", sequence_length=16384, global_batch_size=2),
    "gemma-27b-2048": Question(model="gemma-3-27b", sequence_length=2048, global_batch_size=4),
    "32b-4096": Question(model="qwen2.5-32b", sequence_length=4096, global_batch_size=4, class_name="48Gi"),
    "30b-a3b-2048": Question(model="qwen3-30b-a3b", sequence_length=2048, global_batch_size=8),
    "13b-8192": Question(model="llama-2-13b", sequence_length=8192, global_batch_size=2),
    "70b-2048": Question(model="llama-3.1-70b", sequence_length=2048, global_batch_size=4, class_name="48Gi"),
    "tiny": Question(model="tiny", sequence_length=32, global_batch_size=4, class_name="16Gi"),
}


class OffloadingBench(Bench):
    """`benchmarks.sizing`'s, of jobs that tell what they learn."""

    job = WatchedJob


def main() -> None:
    """Answer the questions, one after the other."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="file that gets a JSON line for every row")
    parser.add_argument("--questions", nargs="+", default=[name for name in QUESTIONS if name != "tiny"])
    parser.add_argument("--seconds", type=float, default=540.0)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    answers: dict[str, Any] = {}
    for name in arguments.questions:
        question = QUESTIONS[name]
        before = len(arguments.rows.read_text().splitlines()) if arguments.rows.exists() else 0
        bench = OffloadingBench(arguments.rows, deadline=deadline)
        for group in question.groups():
            bench.run(group)
        rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()[before:]]
        if rows:
            answers[name] = answer(question, rows)
            print(json.dumps({name: answers[name]}), file=sys.stderr, flush=True)
    emit(answers, save=arguments.save)


def answer(question: Question, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of each plan; those that trained as the first one did are its twins, if it is right."""
    capped = [row for row in rows if row.get("cap_gib")]
    twins = [row for row in rows if not row.get("cap_gib") and "losses" in row]
    found = [judged(question, row, [*twins, *capped]) for row in capped]
    seconds = [each["step_seconds"] for each in found if "step_seconds" in each]
    figures: dict[str, Any] = {"plans": found, "resident": [judged(question, row, capped) for row in twins]}
    if len(seconds) > 1 and "step_seconds" in found[0]:
        figures["chosen_over_fastest"] = round(found[0]["step_seconds"] / min(seconds), 3)
        figures["times_as_fast_as_without"] = round(found[1].get("step_seconds", 0.0) / found[0]["step_seconds"], 3)
    return figures


def judged(question: Question, row: dict[str, Any], others: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A row against its prediction, and against others of the same micro-batches."""
    plan = MemoryPlan.model_validate(row["plan"])
    if "losses" not in row:
        return {"plan": row["plan"], **{name: row[name] for name in ("error", "refused") if name in row}}
    size = row["plan"]["microBatchSize"]
    alike = [o for o in others if o is not row and "losses" in o and o["plan"]["microBatchSize"] == size]
    shortest = min(len(other["losses"]) for other in [row, *alike])
    job = Row.read(row)
    expected = StepTime(question.spec, question.facts, Work()).step_seconds(plan, ordering_card(question.offered))
    return {
        "plan": row["plan"],
        "cap_gib": row["cap_gib"],
        "host_gib": round(offloaded_host_bytes(question.spec, question.facts, plan) / GIB, 2),
        "step_seconds": row["step_seconds"],
        "expected_seconds": round(expected, 5),
        "first_step_seconds": row["first_step_seconds"],
        "compared_with": len(alike),
        "steps": shortest,
        "losses_equal": all(row["losses"][:shortest] == other["losses"][:shortest] for other in alike),
        "adapters_equal": all(
            row["adapter_sha256"] == other["adapter_sha256"]
            for other in alike
            if len(other["losses"]) == len(row["losses"])
        ),
        "predicted_gib": round((0 if job is None else ours(job, margin=True)) / GIB, 3),
        "measured_gib": round(row.get("peak_allocated_bytes", 0) / GIB, 3),
        "reserved_gib": round(row.get("peak_reserved_bytes", 0) / GIB, 3),
    }


if __name__ == "__main__":
    main()
