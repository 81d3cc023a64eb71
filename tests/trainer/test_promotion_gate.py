"""The gate of an alias: what lets an adapter pass, and what it says of what does not."""

from __future__ import annotations

from typing import Any

import pytest
from qlora_trainer.scoring.comparison import Comparison
from qlora_trainer.scoring.gate import judge
from qlora_trainer.scoring.scores import Verdict

from orchestrator.api.formats import Answer, AnsweredPrompt, AnswerTable, Holder
from orchestrator.api.job import GenerationSpec, PromoteSpec
from orchestrator.api.reasons import Reason

PROMPTS = 100
NOBODY, COMPARED = Holder(alias="champion"), Holder(alias="champion", version="3")
SILENT = Holder(alias="champion", version="3", refusal="it is for another base")


def verdict(*rules: dict[str, Any], adapter: int, base: int = 40, holder: int | None = None, who: Holder) -> Verdict:
    """Of answers that are right on so many of a hundred prompts, the first ones."""

    def answer(right: int, number: int) -> Answer:
        return Answer(text="yes" if number < right else "no", tokens=1)

    prompts = tuple(
        AnsweredPrompt(
            prompt="?",
            reference="yes",
            adapter=answer(adapter, number),
            base=answer(base, number),
            holder=None if holder is None else answer(holder, number),
        )
        for number in range(PROMPTS)
    )
    comparison = Comparison(AnswerTable(prompts=prompts), GenerationSpec(metrics=("exactMatch",)), seed=0)
    promote = PromoteSpec.model_validate(
        {"alias": "champion", "when": [{"metric": "exactMatch", **rule} for rule in rules]}
    )
    return judge(promote, comparison, who)


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ({"atLeast": "0.6"}, True),
        ({"atLeast": "0.61"}, False),
        ({"atLeast": "0.6", "confidence": "0.95"}, False),  # between 0.50 and 0.69
        ({"atLeast": "0.49", "confidence": "0.95"}, True),
        ({"atLeast": "0.2", "over": "base"}, True),
        ({"atLeast": "0.21", "over": "base"}, False),
        ({"atLeast": "0.1", "over": "base", "confidence": "0.95"}, True),  # 20 prompts of difference, all one way
        ({"atLeast": "0", "over": "holder"}, False),
        ({"atLeast": "-0.05", "over": "holder"}, True),
        ({"atLeast": "-0.05", "over": "holder", "confidence": "0.95"}, False),
    ],
)
def test_a_rule_holds_a_figure_or_the_end_of_its_interval_against_what_is_asked(
    rule: dict[str, Any], passed: bool
) -> None:
    found = verdict(rule, adapter=60, base=40, holder=65, who=COMPARED)
    assert (found.passed, found.reason) == (passed, Reason.PROMOTED if passed else Reason.GATE_NOT_PASSED)
    assert rule["atLeast"] in found.words


def test_all_rules_must_hold_and_all_are_told() -> None:
    good, bad = {"atLeast": "0.5"}, {"atLeast": "0.5", "over": "base"}
    found = verdict(good, bad, adapter=60, who=NOBODY)
    assert not found.passed
    assert found.words == (
        "exactMatch is 0.6, which reaches 0.5; exactMatch over the base is +0.2, which does not reach 0.5"
    )


def test_where_nobody_has_the_alias_there_is_nobody_to_be_better_than() -> None:
    rule = {"atLeast": "0", "over": "holder"}
    assert verdict(rule, adapter=1, who=NOBODY).passed
    found = verdict(rule, adapter=100, who=SILENT)
    assert (found.passed, found.reason) == (False, Reason.HOLDER_NOT_COMPARED)
    assert "it is for another base" in found.words


def test_a_gate_depends_on_the_holder_where_a_rule_does() -> None:
    alone = PromoteSpec.model_validate({"alias": "a", "when": [{"metric": "f1", "atLeast": "1", "over": "base"}]})
    both = [{"metric": "f1", "atLeast": "1"}, {"metric": "f1", "atLeast": "1", "over": "holder"}]
    assert not alone.depends_on_holder
    assert PromoteSpec.model_validate({"alias": "a", "when": both}).depends_on_holder
