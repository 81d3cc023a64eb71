"""What measured peaks do to the margin."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.job import QLoRAJob
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import Reason
from orchestrator.core.decide import decide
from orchestrator.core.scheduling.cycle import schedule
from orchestrator.sizing.footprint import SLACK_BYTES, SLACK_SHARE, Footprint
from orchestrator.sizing.margins import COVERAGE, DEFAULT, Margins, bounds, conformal_bound, learned, plan_kind
from tests.builders import (
    LLAMA_2_13B,
    LLAMA_3_8B,
    after,
    exited,
    gpus,
    make_attempt,
    make_job,
    make_spec,
    prepared_status,
    running_status,
    snapshot,
    train_result,
    written,
)

PREDICTED = 10 << 30
NAMESPACE, LLAMA = make_job("any").metadata.namespace, "LlamaForCausalLM"
NEW, OLD = "torch 2.11.0, bitsandbytes 0.50.2", "torch 2.9.0, bitsandbytes 0.49.0"


def finished(
    name: str,
    share: float,
    *,
    age_seconds: float = 100,
    versions: str = NEW,
    recompute_layers: int = 0,
    offload: tuple[str, ...] = (),
    reason: Reason = Reason.SUCCEEDED,
) -> QLoRAJob:
    """A job whose train attempt measured so much more than was predicted."""
    attempt = make_attempt(
        plan=MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=recompute_layers, offload=offload),
        finish_time=after(-age_seconds),
        reason=reason,
        predicted_bytes=PREDICTED,
        measured_bytes=round(PREDICTED * (1 + share)) if reason is Reason.SUCCEEDED else None,
        versions=versions,
    )
    status = prepared_status(LLAMA_3_8B, attempts=(attempt,), adapter_uri="file:///a", finish_time=after(-age_seconds))
    return make_job(name, status=status)


def many(shares: list[float], **fields: object) -> list[QLoRAJob]:
    return [finished(f"job-{number}", share, **fields) for number, share in enumerate(shares)]


def share_of(jobs: list[QLoRAJob], recompute_layers: int = 0) -> float:
    """The margin for a plan on the observed architecture."""
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=recompute_layers)
    return (
        learned(jobs).get((NAMESPACE, LLAMA), DEFAULT).share(plan, LLAMA_3_8B.num_layers, recompute_layers, SLACK_SHARE)
    )


# --- the bound -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=300))
def test_the_bound_is_one_of_the_observations_and_all_but_the_largest_few_are_within(shares: list[float]) -> None:
    bound = conformal_bound(shares, COVERAGE)
    if bound is None:
        assert len(shares) < COVERAGE / (1 - COVERAGE)
        return
    assert bound in shares
    assert sum(share <= bound for share in shares) >= COVERAGE * (len(shares) + 1)


@pytest.mark.parametrize("count", [49, 99, 200])
@pytest.mark.parametrize("draw", ["normal", "skewed", "two kinds of jobs"])
def test_the_next_peak_is_within_the_bound_as_often_as_promised(count: int, draw: str) -> None:
    """Whatever the distribution: 4,000 times so many jobs, and then one more."""
    chance = random.Random(f"{count} {draw}")
    draws = {
        "normal": lambda: chance.gauss(0, 0.01),
        "skewed": lambda: chance.expovariate(50) - 0.02,
        "two kinds of jobs": lambda: chance.gauss(0.03 if chance.random() < 0.1 else -0.01, 0.002),
    }
    one, rounds = draws[draw], 4000
    covered = sum(one() <= conformal_bound([one() for _ in range(count)], COVERAGE) for _ in range(rounds))
    four_deviations = 4 * (COVERAGE * (1 - COVERAGE) / rounds) ** 0.5
    assert covered / rounds >= COVERAGE - four_deviations


# --- what it does to margins ---------------------------------------------------------------------------------------


def test_without_observations_the_margin_is_the_models_own() -> None:
    assert share_of([]) == SLACK_SHARE


def test_one_peak_above_the_prediction_widens_the_margin_at_once() -> None:
    jobs = many([-0.01, 0.04])
    assert share_of(jobs) == pytest.approx(0.04)
    [bound] = bounds(jobs)
    assert (bound.observations, bound.certain) == (2, False)


def test_few_peaks_below_it_do_not_tighten_it_and_many_do() -> None:
    assert share_of(many([-0.01] * 20)) == SLACK_SHARE
    assert share_of(many([-0.01] * 60)) == 0.0
    assert share_of(many([0.001] * 60)) == pytest.approx(0.001)


def test_each_kind_of_plan_has_its_own_margin_and_one_that_was_not_seen_the_widest() -> None:
    jobs = [finished("all", 0.04, recompute_layers=32), finished("none", 0.01)]
    assert share_of(jobs, 32) == share_of(jobs, 16) == pytest.approx(0.04)
    assert share_of(jobs, 0) == pytest.approx(0.01)
    assert plan_kind(3, 32, ("activations", "embeddings")) == "mixed+activations+embeddings"


def test_what_older_libraries_took_is_forgotten_once_newer_ones_have_finished_a_job() -> None:
    before = many([0.08], versions=OLD, age_seconds=1000)
    assert share_of(before) == pytest.approx(0.08)
    assert share_of([*before, finished("new", 0.01)]) == pytest.approx(0.01)


def test_an_attempt_that_ran_out_of_memory_counts_as_what_the_card_offers() -> None:
    [bound] = bounds([finished("oom", 0.0, reason=Reason.OUT_OF_MEMORY)])
    assert bound.worst_share == pytest.approx(21.5 / 10 - 1)
    assert bound.share == 0.25, "more than that is no error of the model"


def test_what_one_namespace_measured_moves_no_others_margins() -> None:
    """Whoever may write what pods say there could have made it up, too high or too low."""
    theirs = [
        job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": "stranger"})})
        for job in (*many([-0.4] * 60), finished("worse", 0.2))
    ]
    assert share_of(theirs) == share_of([]) == SLACK_SHARE
    assert learned(theirs)["stranger", LLAMA].shares[0][1] == pytest.approx(0.2)
    assert share_of([*theirs, finished("ours", 0.04)]) == pytest.approx(0.04)


def test_an_attempt_that_was_moved_away_says_nothing() -> None:
    job = finished("moved", 0.0)
    attempts = tuple(each.model_copy(update={"reason": Reason.PREEMPTED}) for each in job.status.attempts)
    assert bounds([job.model_copy(update={"status": job.status.model_copy(update={"attempts": attempts})})]) == ()


def test_the_margin_is_a_line_of_the_estimate() -> None:
    spec = make_spec()
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=0)
    for margins, share in ((DEFAULT, SLACK_SHARE), (Margins(shares=(("kept", 0.1, False),)), 0.1)):
        items = Footprint(spec, LLAMA_3_8B, plan, margins=margins).items(0)
        margin = next(item.bytes for item in items if item.name == "margin")
        rest = sum(item.bytes for item in items) - margin
        assert margin == round(SLACK_BYTES + share * rest)


# --- in the controller ---------------------------------------------------------------------------------------------


def test_a_finished_attempt_records_what_was_predicted_and_what_was_measured() -> None:
    waiting = make_job(status=prepared_status(LLAMA_3_8B))
    admitted = written(decide(snapshot(waiting, gpu_classes=gpus(_24Gi=1))))
    assert admitted.attempts[-1].predicted_bytes == admitted.estimate.predicted_bytes
    assert 0 < admitted.estimate.predicted_bytes < admitted.estimate.peak_bytes
    job = make_job(status=running_status(model=LLAMA_3_8B))
    result = train_result()
    measured = result.train.model_copy(update={"peak_allocated_bytes": 123, "versions": NEW})
    status = written(decide(snapshot(job, stages=(exited(job, 0, result.model_copy(update={"train": measured})),))))
    trained = next(each for each in status.attempts if each.stage == "train")
    assert (trained.measured_bytes, trained.versions) == (123, NEW)


def test_waiting_jobs_of_the_same_architecture_are_sized_with_what_was_learned() -> None:
    waiting = make_job("waiting", status=prepared_status(LLAMA_2_13B), sequence_length=4096)
    here = tuple(replace(each, host_bytes=0) for each in gpus(_24Gi=1, _48Gi=1))
    before = schedule(snapshot(waiting, gpu_classes=here)).placements[0].estimate
    assert 0 < before.plan.recompute_layers < 32, "a mixed plan of both models"
    taught = finished("taught", 0.2, recompute_layers=before.plan.recompute_layers, offload=before.plan.offload)
    after_all = schedule(snapshot(waiting, taught, gpu_classes=here)).placements[0].estimate
    assert after_all.gpu_class == before.gpu_class
    assert after_all.predicted_bytes * 1.2 <= after_all.usable_bytes


def test_the_same_jobs_are_not_worked_out_again_and_a_changed_one_counts_at_once() -> None:
    jobs = [finished(f"job-{number}", 0.01) for number in range(3)]
    before = learned(jobs)
    assert learned([*jobs, make_job("waiting")]) is before
    worse = [*jobs[:2], finished("job-2", 0.03)]
    assert worse[2].metadata == jobs[2].metadata
    assert learned(worse)[NAMESPACE, LLAMA].shares[0][1] == pytest.approx(0.03)
    assert learned(jobs) == before
