"""Asynchronous successive halving (ASHA): which trials end at a rung (Li et al., 2020, arXiv:1810.05934).

As soon as a trial has passed a rung it is compared with those that have come there before it, in the order in which
they are on record. So nobody waits for anybody, and what was decided stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.api.results import ProgressReport
from orchestrator.api.sweep import MAX_RUNGS, EarlyStop, QLoRASweepSpec, RungResult, SweepMetric, TrialStatus


def metric_of(report: ProgressReport | None, metric: SweepMetric) -> float | None:
    """The latest figure of a sweep's metric."""
    if report is None:
        return None
    return report.eval_loss if metric.name == "eval/loss" else report.loss


def is_better(one: float, other: float, metric: SweepMetric) -> bool:
    """Whether the one is strictly better."""
    return one < other if metric.mode == "min" else one > other


def rungs(stop: EarlyStop, steps: int) -> list[int]:
    """The steps of all rungs that training of so many steps passes."""
    found, step = list[int](), stop.first_step
    while step < steps and len(found) < MAX_RUNGS:
        found.append(step)
        step *= stop.eta
    return found


def reached(spec: QLoRASweepSpec, trial: TrialStatus, report: ProgressReport | None) -> RungResult | None:
    """The rung that a report is the first to be of; the highest, where several were passed since the last report.

    A rung counts once a step beyond it is made: by then what is evaluated at the rung itself has been.
    """
    value = metric_of(report, spec.metric)
    if spec.early_stop is None or report is None or report.stage != "train" or value is None:
        return None
    passed = [step for step in rungs(spec.early_stop, report.steps) if step < report.step]
    known = trial.rungs[-1].step if trial.rungs else 0
    return RungResult(step=passed[-1], value=value) if passed and passed[-1] > known else None


def goes_on(spec: QLoRASweepSpec, result: RungResult, others: Iterable[TrialStatus]) -> bool:
    """Whether a trial is in the best 1/eta, rounded up, of those that are on record at the rung, itself among them."""
    assert spec.early_stop is not None, "otherwise there are no rungs"
    there = [found.value for trial in others for found in trial.rungs if found.step == result.step]
    kept = -(-(len(there) + 1) // spec.early_stop.eta)
    return _ahead(there, result.value, spec.metric) < kept


def _ahead(values: Sequence[float], value: float, metric: SweepMetric) -> int:
    return sum(is_better(other, value, metric) for other in values)
