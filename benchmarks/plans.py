"""Whether the plan that is chosen for a job is as fast as any other: it and its rivals, timed on a GPU.

    python -m benchmarks.plans [--seconds 540] [--questions 3] [--save plans [--go-on]]

A question is a model with all its layers and random weights, a sequence length, a global batch and a GPU class, whose
bytes the allocator is capped to. Rivals are the next plans in the order of `sizing/plan_search`, which has the best one
of every micro-batch and way to spend memory; the best that compute attention otherwise, or keep what it gave where the
chosen one does not; the best that has no layers' activations on the host; the chosen plan with fewer recomputed layers,
which by the estimate does not fit; and with all of them recomputed. A rival that runs out of memory is out. Times are
of whole optimizer steps, the first of which does not count. Where the machine has several GPUs, each is asked questions
of its own. What was saved can be gone on with: questions that it answers are not asked again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import questions
from benchmarks.architectures import CONFIGS
from benchmarks.report import RESULTS, argument_parser, circumstances, class_here, emit

from benchmarks.sizing import GIB, Bench, Case, Group  # isort: skip - sets torch's allocator up before it is loaded
import torch
from qlora_trainer.kernels.flash_attention import has_kernels_for

from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing import plan_search

IN_ORDER = 4
"""Plans that are taken from the order, the chosen one first."""
LOOKED_AT = 200
"""How far down the order the best plan that treats attention otherwise is looked for."""
BOLDER = 0.8
"""Share of the chosen plan's recomputed layers that a bolder one recomputes."""
AS_GOOD = 1.05
TIMED_SECONDS = 2.0
"""How long steps are timed, at least."""


class Question(questions.Question):
    """A job and the class that it is to run on."""

    @property
    def name(self) -> str:
        """The question in words."""
        return f"{self.model} {self.sequence_length} x {self.global_batch_size} on {self.class_name}"

    def group(self) -> Group:
        """The chosen plan first, then its rivals."""
        on = class_here(self.class_name)
        spec, facts = self.spec, self.facts
        facts = facts.model_copy(update={"flash_attention": has_kernels_for(facts.head_dim)})
        in_order = list(islice(plan_search.plans(spec, facts, on), LOOKED_AT))
        assert in_order, f"{self.name} does not fit"
        without = next((plan for plan in in_order if not plan.offloaded_layers), None)
        rivals = [*_other_attention(in_order), *_other_recompute(in_order[0], facts.num_layers)]
        rivals += [] if without is None else [without]
        cases = tuple(
            Case(adapter=spec.adapter, training=spec.training, plan=plan, cap_gib=on.usable_bytes / GIB)
            for plan in dict.fromkeys([*in_order[:IN_ORDER], *rivals])
        )
        return Group(model=self.model, layers=facts.num_layers, cases=cases, part="plans")


def _other_attention(in_order: list[MemoryPlan]) -> list[MemoryPlan]:
    """The first plan of each way to treat attention."""
    first: dict[tuple[str, bool], MemoryPlan] = {}
    for plan in in_order:
        first.setdefault((plan.attention, plan.keep_attention), plan)
    return list(first.values())


def _other_recompute(chosen: MemoryPlan, layers: int) -> Iterator[MemoryPlan]:
    yield chosen.model_copy(update={"recompute_layers": int(chosen.recompute_layers * BOLDER)})
    yield chosen.model_copy(update={"recompute_layers": layers})


QUESTIONS = (
    Question(model="llama-3.1-70b", sequence_length=4096, global_batch_size=2, class_name="48Gi"),
    Question(model="llama-3.1-70b", sequence_length=512, global_batch_size=4, class_name="48Gi"),
    Question(model="llama-3.1-8b", sequence_length=2048, global_batch_size=8),
    Question(model="llama-2-13b", sequence_length=2048, global_batch_size=4),
    Question(model="llama-2-13b", sequence_length=8192, global_batch_size=2),
    Question(model="qwen2.5-7b", sequence_length=4096, global_batch_size=4),
    Question(model="llama-3.1-8b", sequence_length=32768, global_batch_size=1),
    Question(model="qwen3-8b", sequence_length=16384, global_batch_size=2),
    Question(model="qwen2.5-32b", sequence_length=8192, global_batch_size=1, class_name="48Gi"),
    Question(model="llama-2-13b", sequence_length=4096, global_batch_size=4),
    Question(model="llama-3.1-8b", sequence_length=8192, global_batch_size=4, class_name="48Gi"),
    Question(model="qwen3-0.6b", sequence_length=8192, global_batch_size=4, class_name="16Gi"),
    Question(model="qwen3-0.6b", sequence_length=1024, global_batch_size=16),
    Question(model="llama-3.1-8b", sequence_length=512, global_batch_size=16),
    Question(model="llama-3.2-1b", sequence_length=4096, global_batch_size=8, class_name="16Gi"),
    Question(model="mistral-7b", sequence_length=16384, global_batch_size=2),
    Question(model="gemma-2-2b", sequence_length=2048, global_batch_size=8),
    Question(model="phi-4-14b", sequence_length=2048, global_batch_size=4),
    Question(model="qwen2.5-32b", sequence_length=1024, global_batch_size=4, class_name="48Gi"),
    Question(model="qwen3-30b-a3b", sequence_length=2048, global_batch_size=8),
    Question(model="smollm2-135m", sequence_length=2048, global_batch_size=16, class_name="16Gi"),
)
"""Those that take long, and those about attention, first: the time may not reach for all."""


def main() -> None:
    """Ask as many questions as the time allows."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    parser.add_argument("--models", nargs="*", help="only questions about these; default: about all")
    parser.add_argument("--go-on", action="store_true", help="keep the answers that --save's file has already")
    arguments = parser.parse_args()
    known = saved_answers(arguments.save) if arguments.go_on else {}
    assert all(question.model in CONFIGS for question in QUESTIONS)
    deadline = time.monotonic() + arguments.seconds
    asked = [
        each
        for each in QUESTIONS[: arguments.questions]
        if each.name not in known and (arguments.models is None or each.model in arguments.models)
    ]
    answers = known | ask_all(asked, deadline)
    emit(report({each.name: answers[each.name] for each in QUESTIONS if each.name in answers}), save=arguments.save)


def saved_answers(name: str) -> dict[str, Any]:
    """The answers in a file of results, which a card of the same name with the same packages has to have given."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    here = circumstances()
    assert (document["card"], document["versions"]) == (here["card"], here["versions"]), f"{name} is from elsewhere"
    return document["results"]["answers"]


def ask_all(questions: Iterable[Question], deadline: float) -> dict[str, Any]:
    """What became of each question, by its name; each GPU has a process of its own, which takes the next in order."""
    spawned = multiprocessing.get_context("spawn")
    gpus = spawned.SimpleQueue()
    count = max(1, torch.cuda.device_count())
    for index in range(count):
        gpus.put(index)
    answers: dict[str, Any] = {}
    with ProcessPoolExecutor(count, mp_context=spawned, initializer=_take_gpu, initargs=(gpus,)) as pool:
        asked = {pool.submit(ask, question, deadline): question.name for question in questions}
        for answered in as_completed(asked):
            answer = answered.result()
            if answer["plans"]:
                name = asked[answered]
                answers[name] = answer
                print(name, answer.get("chosen_over_fastest"), file=sys.stderr, flush=True)
    return answers


def _take_gpu(gpus: multiprocessing.SimpleQueue[int]) -> None:
    """This process sees one GPU of its own: set before it first asks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus.get())


def ask(question: Question, deadline: float) -> dict[str, Any]:
    """What became of each plan, the chosen one first."""
    if time.monotonic() > deadline:
        return judge([])
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
