"""What a run and a card show of answers to held-out prompts: scores with their intervals, and the answers.

And what was answered at evaluations, while training went on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.api.formats import Answer, AnswerTable, JournalRecord
from orchestrator.api.job import AnswerMetric
from qlora_trainer.scoring.scores import CONFIDENCE, Interval, Score, Verdict

UPPER = re.compile("[A-Z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswers:
    """The answers of a job, and what they are worth."""

    table: AnswerTable
    scores: Mapping[AnswerMetric, Score]
    verdict: Verdict | None = None
    """Of the gate, where the job has one."""


def metrics(answers: ScoredAnswers) -> dict[str, float]:
    """The scores as metrics of the run, `eval/exact_match` of the adapter and `eval/exact_match_base` of the base."""
    found: dict[str, float] = {}
    for name, score in answers.scores.items():
        key = f"eval/{UPPER.sub(lambda letter: f'_{letter[0].lower()}', name)}"
        found |= {key: score.adapter.value, f"{key}_base": score.base.value}
        found |= {f"{key}_over_base": score.over_base.value}
        if score.holder is not None and score.over_holder is not None:
            found |= {f"{key}_holder": score.holder.value, f"{key}_over_holder": score.over_holder.value}
    return found


def score_rows(answers: ScoredAnswers) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row a metric, each figure with the interval that it lies in."""
    holder = answers.table.holder
    named = f"version {holder.version}" if holder is not None and holder.version is not None else "holder"
    has_holder = any(score.holder is not None for score in answers.scores.values())
    columns = ["metric", "base", *([named] if has_holder else []), "adapter", "adapter - base"]
    rows = [
        [
            name,
            _shown(score.base),
            *([_shown(score.holder)] if score.holder is not None else []),
            _shown(score.adapter),
            _shown(score.over_base, signed=True),
            *([_shown(score.over_holder, signed=True)] if score.over_holder is not None else []),
        ]
        for name, score in answers.scores.items()
    ]
    return [*columns, *([f"adapter - {named}"] if has_holder else [])], rows


def scores_table(answers: ScoredAnswers) -> dict[str, list[object]]:
    """The scores as MLflow keeps a table."""
    columns, rows = score_rows(answers)
    return {"columns": list(columns), "data": list(rows)}


def answers_table(answers: ScoredAnswers) -> dict[str, list[object]]:
    """The answers as MLflow keeps a table."""
    has_holder = any(each.holder is not None for each in answers.table.prompts)
    columns: list[object] = ["prompt", "reference", "base", *(["holder"] if has_holder else []), "adapter"]
    data: list[object] = [
        [
            each.prompt,
            each.reference,
            each.base.text,
            *([_text(each.holder)] if has_holder else []),
            each.adapter.text,
        ]
        for each in answers.table.prompts
    ]
    return {"columns": columns, "data": data}


def sampled(journal: Iterable[JournalRecord]) -> list[JournalRecord]:
    """The evaluations at which prompts were asked."""
    return [record for record in journal if record.samples]


def samples_table(evaluations: Sequence[JournalRecord]) -> dict[str, list[object]]:
    """What was answered at evaluations as MLflow keeps a table: each prompt with its answers, one below the other."""
    rows: list[tuple[int, list[object]]] = [
        (number, [sample.prompt, sample.reference, record.step, sample.answer])
        for record in evaluations
        for number, sample in enumerate(record.samples)
    ]
    data: list[object] = [row for _, row in sorted(rows, key=lambda each: each[0])]
    return {"columns": ["prompt", "reference", "step", "answer"], "data": data}


def words(answers: ScoredAnswers) -> Iterator[str]:
    """What has to be known to read the scores, in sentences."""
    yield (
        f"{len(answers.table.prompts)} held-out prompts, answered greedily. In brackets: where a figure lies with "
        f"{CONFIDENCE:.0%} confidence, by 10,000 resamples of the prompts, the same for all who answered."
    )
    holder = answers.table.holder
    if holder is not None and holder.refusal:
        who = f"Version {holder.version}, which had" if holder.version is not None else "Whoever had"
        yield f"{who} the alias {holder.alias}, did not answer: {holder.refusal}."
    if answers.verdict is not None:
        outcome = "passed" if answers.verdict.passed else "not passed"
        yield f"The gate is {outcome}: {answers.verdict.words}."


def _text(answer: Answer | None) -> str:
    return "" if answer is None else answer.text


def _shown(interval: Interval, *, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
