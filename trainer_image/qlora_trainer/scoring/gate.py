"""The gate of an alias: whether answers to held-out prompts are as good as a job's spec asks."""

from __future__ import annotations

from orchestrator.api.formats import Holder
from orchestrator.api.job import GateRule, PromoteSpec
from orchestrator.api.reasons import Reason
from qlora_trainer.scoring.comparison import Comparison
from qlora_trainer.scoring.scores import CONFIDENCE, Interval, Score, Verdict

ROUNDING = 1e-9
"""0.6 - 0.4 is less than 0.2 in floats."""


def judge(promote: PromoteSpec, comparison: Comparison, holder: Holder | None) -> Verdict:
    """All rules held against the scores; `holder` is whom the adapter was compared with.

    Where nobody has the alias there is nobody to be better than; where its holder did not answer, nobody knows.
    """
    findings = [_finding(rule, comparison, holder) for rule in promote.when]
    words = "; ".join(each.words for each in findings)
    failed = next((each.reason for each in findings if not each.passed), None)
    return Verdict(passed=failed is None, reason=failed or Reason.PROMOTED, words=words)


def _finding(rule: GateRule, comparison: Comparison, holder: Holder | None) -> Verdict:
    confidence = CONFIDENCE if rule.confidence is None else float(rule.confidence)
    found = _interval(rule, comparison.score(rule.metric, confidence))
    against = "" if rule.over is None else f" over the {rule.over}"
    if found is None and holder is not None and holder.version is None and not holder.refusal:
        words = f"{rule.metric}{against}: nobody has the alias"
        return Verdict(passed=True, reason=Reason.PROMOTED, words=words)
    if found is None:
        why = holder.refusal if holder is not None and holder.refusal else "it did not answer"
        words = f"{rule.metric}{against} is not known: {why}"
        return Verdict(passed=False, reason=Reason.HOLDER_NOT_COMPARED, words=words)
    reached, sure = (found.value, "") if rule.confidence is None else (found.low, f", with {confidence:.0%} confidence")
    passed = reached >= float(rule.at_least) - ROUNDING
    form = ".4g" if rule.over is None else "+.4g"
    words = (
        f"{rule.metric}{against} is {found.value:{form}}{sure and f' and at least {found.low:{form}}{sure}'}, "
        f"{'which reaches' if passed else 'which does not reach'} {rule.at_least}"
    )
    return Verdict(passed=passed, reason=Reason.PROMOTED if passed else Reason.GATE_NOT_PASSED, words=words)


def _interval(rule: GateRule, score: Score) -> Interval | None:
    match rule.over:
        case None:
            return score.adapter
        case "base":
            return score.over_base
        case "holder":
            return score.over_holder
