"""Whether the plan that is chosen for a job is as fast as any other: it and its rivals, timed on one GPU.

    python -m benchmarks.plans [--seconds 540] [--questions 3] [--save plan_search]

A question is a model with all its layers and random weights, a sequence length, a global batch and a GPU class, whose
bytes the allocator is capped to. Rivals are the next plans in the order of `sizing/plan_search`, which has the
best one of every micro-batch and way to offload; the chosen plan with fewer recomputed layers, which by the estimate
does not fit; and with all of them recomputed. A rival that runs out of memory is out. Times are of whole optimizer
steps, the first of which does not count.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.architectures import CONFIGS, config
from benchmarks.report import argument_parser, card, emit

from benchmarks.sizing import GIB, Bench, Case, Group  # isort: skip - sets torch's allocator up before it is loaded
from qlora_trainer.kernels.flash_attention import has_kernels_for

from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing import plan_search
from orchestrator.sizing.hardware import gpu_class

IN_ORDER = 5
"""Plans that are taken from the order, the chosen one first."""
BOLDER = 0.8
"""Share of the chosen plan's recomputed layers that a bolder one recomputes."""
AS_GOOD = 1.05
TIMED_SECONDS = 2.0
"""How long steps are timed, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A job and the class that it is to run on."""

    model: str
    sequence_length: int
    global_batch_size: int
    class_name: str = "24Gi"

    @property
    def name(self) -> str:
        """The question in words."""
        return f"{self.model} {self.sequence_length} x {self.global_batch_size} on {self.class_name}"

    def group(self) -> Group:
        """The chosen plan first, then its rivals."""
        # The class's bytes, at the speed of the card that this runs on.
        on = gpu_class(self.class_name, capacity=1, products=[card()])
        spec = QLoRAJobSpec(
            model=ModelSource(source="file:///model"),
            dataset=DatasetSource(source="file:///data.jsonl"),
            adapter=AdapterSpec(rank=16),
            training=TrainingSpec(sequence_length=self.sequence_length, global_batch_size=self.global_batch_size),
        )
        facts = ModelFacts.from_config(config(self.model), "main")
        facts = facts.model_copy(update={"flash_attention": has_kernels_for(facts.head_dim)})
        in_order = list(islice(plan_search.plans(spec, facts, on), IN_ORDER))
        assert in_order, f"{self.name} does not fit"
        cases = tuple(
            Case(adapter=spec.adapter, training=spec.training, plan=plan, cap_gib=on.usable_bytes / GIB)
            for plan in dict.fromkeys([*in_order, *_other_recompute(in_order[0], facts.num_layers)])
        )
        return Group(model=self.model, layers=facts.num_layers, cases=cases, part="plans")


def _other_recompute(chosen: MemoryPlan, layers: int) -> Iterator[MemoryPlan]:
    yield chosen.model_copy(update={"recompute_layers": int(chosen.recompute_layers * BOLDER)})
    yield chosen.model_copy(update={"recompute_layers": layers})


QUESTIONS = (
    Question(model="llama-3.1-8b", sequence_length=2048, global_batch_size=8),
    Question(model="llama-2-13b", sequence_length=2048, global_batch_size=4),
    Question(model="qwen3-0.6b", sequence_length=1024, global_batch_size=16),
    Question(model="llama-3.1-8b", sequence_length=512, global_batch_size=16),
    Question(model="qwen2.5-7b", sequence_length=4096, global_batch_size=4),
    Question(model="llama-3.1-70b", sequence_length=512, global_batch_size=4, class_name="48Gi"),
    Question(model="llama-3.2-1b", sequence_length=4096, global_batch_size=8, class_name="16Gi"),
    Question(model="gemma-2-2b", sequence_length=2048, global_batch_size=8),
    Question(model="phi-4-14b", sequence_length=2048, global_batch_size=4),
    Question(model="qwen2.5-32b", sequence_length=1024, global_batch_size=4, class_name="48Gi"),
    Question(model="smollm2-135m", sequence_length=2048, global_batch_size=16, class_name="16Gi"),
    Question(model="qwen3-30b-a3b", sequence_length=2048, global_batch_size=8),
    Question(model="mistral-7b", sequence_length=16384, global_batch_size=2),
)


def main() -> None:
    """Ask as many questions as the time allows."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    parser.add_argument("--models", nargs="*", help="only questions about these; default: about all")
    arguments = parser.parse_args()
    assert all(question.model in CONFIGS for question in QUESTIONS)
    deadline = time.monotonic() + arguments.seconds
    answers: dict[str, Any] = {}
    for question in QUESTIONS[: arguments.questions]:
        asked = arguments.models is None or question.model in arguments.models
        if asked and time.monotonic() < deadline:
            answers[question.name] = ask(question, deadline)
    emit(report(answers), save=arguments.save)


def ask(question: Question, deadline: float) -> dict[str, Any]:
    """What became of each plan, the chosen one first."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        Bench(rows, deadline=deadline, timed_seconds=TIMED_SECONDS).run(question.group())
        return judge([json.loads(line) for line in rows.read_text().splitlines()])


def judge(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How the first row's plan compares with the fastest."""
    timed = [
        {"plan": row["plan"], **{key: row[key] for key in ("step_seconds", "error") if key in row}} for row in rows
    ]
    seconds = [each["step_seconds"] for each in timed if "step_seconds" in each]
    if len(seconds) < 2 or "step_seconds" not in timed[0]:
        return {"plans": timed}
    return {"plans": timed, "chosen_over_fastest": round(timed[0]["step_seconds"] / min(seconds), 3)}


def report(answers: dict[str, Any]) -> dict[str, object]:
    """The answers and what they come to."""
    ratios = [answer["chosen_over_fastest"] for answer in answers.values() if "chosen_over_fastest" in answer]
    return {
        "questions": len(ratios),
        "within_5_percent": sum(ratio <= AS_GOOD for ratio in ratios),
        "worst": max(ratios, default=None),
        "answers": answers,
    }


if __name__ == "__main__":
    main()
