"""Why a job is where it is: the decision of this moment, in sentences.

Nothing is worked out anew: `schedule` decides over the snapshot as for every other purpose, and this puts the outcome
into words, the plainest first: where the job is, its place in line, what it fits, who has that, what would have to
happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta

from orchestrator.api.job import QLoRAJob, ResourcesSpec
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import Reason, Recovery, Refusal
from orchestrator.core.forecast import Outlook, outlook
from orchestrator.core.job.eviction_budget import budget_words, protection_of
from orchestrator.core.job.setbacks import avoided_classes, counted_failures
from orchestrator.core.job.state_machine import GPU_STATES, TERMINAL_STATES
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.claims import may_change_class
from orchestrator.core.scheduling.cycle import Schedule, schedule
from orchestrator.core.scheduling.ordering import Claim, queue_specs, standing
from orchestrator.core.scheduling.turns import has_advanced, turn_ends
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.sizing.gpu_table import gpu_table
from orchestrator.sizing.hardware import GIB, priced
from orchestrator.sizing.margins import DEFAULT, learned
from orchestrator.sizing.plan_search import candidates, choose_class
from orchestrator.sizing.step_time import Work

NAMES_TOLD = 3  # of those ahead or in possession; the rest is a number


def explain(snapshot: Snapshot, key: str) -> tuple[str, ...]:
    """Sentences about the job `namespace/name`, in the order in which to read them."""
    return explain_scheduled(schedule(snapshot), snapshot, key, look_ahead=lambda: outlook(snapshot, key))


def explain_scheduled(
    outcome: Schedule, snapshot: Snapshot, key: str, *, look_ahead: Callable[[], Outlook] | None = None
) -> tuple[str, ...]:
    """The same by a decision that is made already; without `look_ahead`, which takes longest, nothing of when."""
    draft = outcome.drafts.get(key)
    if draft is None:
        return (f"There is no job {key}.",)
    return tuple(_sentences(draft, outcome, snapshot, look_ahead))


def explain_recorded(job: QLoRAJob, policy: Policy, now: datetime) -> tuple[str, ...]:
    """Sentences about a job from its status alone: what was last said of it, and what has gone wrong."""
    draft = Draft.open(job, now)
    told = f"{job.key} is {draft.state.value.lower()}: {_what(draft)}."
    return (told, *(() if draft.state in TERMINAL_STATES else _history(draft, policy)))


def _sentences(
    draft: Draft, outcome: Schedule, snapshot: Snapshot, look_ahead: Callable[[], Outlook] | None
) -> Iterator[str]:
    key = draft.job.key
    refusal = outcome.refusals.get(key)
    what = f"{refusal.reason.value}: {refusal.message}" if refusal is not None else _what(draft)
    yield f"{key} is {draft.state.value.lower()}: {what}."
    if draft.state in TERMINAL_STATES:
        return
    place = next((i for i, claim in enumerate(outcome.line) if claim.key == key), None)
    if place is not None:
        yield from _in_line(outcome.line, place)
        yield from _among_users(outcome.line[place], outcome, snapshot)
        yield from _turns(outcome.line[place], outcome, snapshot)
        yield from _wanted(outcome.line[place], outcome, snapshot)
        yield from _kept_class(draft, outcome.line[place], snapshot)
        yield from _neighbours(draft, outcome.line[place], snapshot)
    yield from _next(key, outcome)
    if place is not None:
        yield from _protected(outcome.line[place], outcome, snapshot)
    if look_ahead is not None and (place is not None or draft.state in GPU_STATES):
        yield from _when(look_ahead(), snapshot.now)
    yield from _history(draft, snapshot.policy)


def _what(draft: Draft) -> str:
    try:
        write = draft.close()
    except ValueError:  # a status that only a stranger can have written: whoever decides ends the job
        return "its status cannot be written, so it fails"
    return (write.status if write is not None else draft.status).summary.rstrip(".") or "nothing has happened yet"


def _in_line(line: Sequence[Claim], place: int) -> Iterator[str]:
    claim = line[place]
    where = f"priority {claim.priority} in queue {claim.queue}"
    if place == 0:
        yield f"It is first of {len(line)} in line for a GPU ({where})."
        return
    ahead = listed([f"{other.key} (priority {other.priority}, queue {other.queue})" for other in line[:place]])
    yield f"It is number {place + 1} of {len(line)} in line for a GPU ({where}); ahead of it: {ahead}."


def _among_users(claim: Claim, outcome: Schedule, snapshot: Snapshot) -> Iterator[str]:
    """Whose turn it is in a queue that is shared out by user."""
    spec = queue_specs(snapshot.queues).get(claim.queue)
    if spec is None or spec.fair_sharing != "PerUser":
        return
    waiting = {other.user for other in outcome.line if other.queue == claim.queue and other.priority == claim.priority}
    had = {user: outcome.users.get((claim.queue, user), 0.0) for user in waiting}
    before = sorted((share, user) for user, share in had.items() if share < had[claim.user])
    others = (
        f"; before it, with less: {listed([user for _, user in before])}" if before else "; nobody here has had less"
    )
    yield (
        f"Queue {claim.queue} is shared out by user: {claim.user} has had {had[claim.user]:.1%} of the cluster's GPU "
        f"time of late there{others}."
    )


def _turns(claim: Claim, outcome: Schedule, snapshot: Snapshot) -> Iterator[str]:
    """When the next of its equals has had his turn, in a queue that gives turns."""
    queues, policy = queue_specs(snapshot.queues), snapshot.policy
    equals = (
        draft
        for draft in outcome.drafts.values()
        if draft.job.spec.queue == claim.queue and standing(draft.job, queues) <= claim.priority
    )
    ends = [
        (end, draft)
        for draft in equals
        if (end := turn_ends(draft, queues, policy)) is not None and any(_holds(draft, name) for name in claim.classes)
    ]
    if not ends:
        return
    end, draft = min(ends, key=lambda each: (each[0], each[1].job.key))
    left, attempt = (end - snapshot.now).total_seconds(), draft.attempt
    when = f"in {left / 60:.0f} minutes" if left >= 60 else "in less than a minute" if left > 0 else "now"
    yield (
        f"Queue {claim.queue} gives turns of {queues[claim.queue].turn_seconds} s: the next one to end is that of "
        f"{draft.job.key} on {attempt.gpu_class if attempt else ''}, {when}"
        f"{'' if has_advanced(draft) else ', or later, once it has saved a checkpoint'}."
    )


def _wanted(claim: Claim, outcome: Schedule, snapshot: Snapshot) -> Iterator[str]:
    """What it fits, and who has that."""
    capacity = {gpu_class.name: gpu_class.capacity for gpu_class in snapshot.gpu_classes}
    for estimate in claim.estimates:
        name = estimate.gpu_class
        holders = [d.job.key for d in outcome.drafts.values() if _holds(d, name) and d.job.key != claim.key]
        yield (
            f"It needs {estimate.peak_bytes / GIB:.1f} of the {estimate.usable_bytes / GIB:.1f} GiB of {name}; "
            f"{len(holders)} of {capacity.get(name, 0)} {name} GPUs are held by others"
            f"{': ' + listed(holders) if holders else ''}.{_time_and_price(estimate)}"
        )


def _time_and_price(estimate: Estimate) -> str:
    if estimate.seconds is None:
        return ""
    price = f" and ${estimate.dollars:.2f}" if estimate.dollars is not None else ""
    return f" Its steps take about {span(timedelta(seconds=estimate.seconds))}{price} there."


def _kept_class(draft: Draft, claim: Claim, snapshot: Snapshot) -> Iterator[str]:
    """What a job would have besides the class that it began on, if it might change it."""
    spec, prepared = draft.job.spec.settled(draft.status.start), draft.status.prepared
    if draft.status.checkpoint is None or prepared is None or may_change_class(spec) or len(claim.estimates) != 1:
        return
    kept = claim.estimates[0].gpu_class
    margins = learned(snapshot.jobs).get((draft.job.metadata.namespace, prepared.model.architecture), DEFAULT)
    found = candidates(spec, prepared.model, snapshot.gpu_classes, work=Work.of(prepared), margins=margins)
    others = [] if isinstance(found, Refusal) else [e.gpu_class for e in found if e.gpu_class != kept]
    if others:
        why = "to go on bit for bit; " if spec.training.deterministic else "as its resources.classChange asks; "
        yield (
            f"It keeps {kept}, on which it began, {why}with resources.classChange: allowed it could go on on "
            f"{listed(others)}, too."
        )


def _neighbours(draft: Draft, claim: Claim, snapshot: Snapshot) -> Iterator[str]:
    """What the class below and the class above the preferred one would mean, here or not."""
    preferred = claim.estimates[0].gpu_class
    prepared = draft.status.prepared
    table = gpu_table(snapshot.policy.gpu_class_definitions)
    if preferred not in table.names or prepared is None:
        return
    known = {gpu_class.name: gpu_class for gpu_class in snapshot.gpu_classes}
    margins = learned(snapshot.jobs).get((draft.job.metadata.namespace, prepared.model.architecture), DEFAULT)
    place = table.names.index(preferred)
    for way, index in (("smaller", place - 1), ("larger", place + 1)):
        if not 0 <= index < len(table.names):
            continue
        name = table.names[index]
        offered = known.get(name) or priced([table.gpu_class(name, 0)], snapshot.policy.gpu_prices)[0]
        spec = draft.job.spec.settled(prepared.start).model_copy(update={"resources": ResourcesSpec()})
        found = choose_class(spec, prepared.model, (offered,), work=Work.of(prepared), margins=margins)
        if isinstance(found, Refusal):
            yield f"The next {way} class, {name}, does not do: it {found.message}."
        else:
            here = "fits" if name in known else "would fit, but there is none here"
            layers = found.plan.streamed_layers
            streamed = f", {layers} layers streamed from host memory" if layers else ""
            gib = found.peak_bytes / GIB
            yield f"The next {way} class, {name}, {here}: {gib:.1f} GiB{streamed}.{_time_and_price(found)}"


def _holds(draft: Draft, gpu_class: str) -> bool:
    attempt = draft.attempt
    return draft.state in GPU_STATES and attempt is not None and attempt.gpu_class == gpu_class


def _next(key: str, outcome: Schedule) -> Iterator[str]:
    """What happens now, or what would have to."""
    placement = next((p for p in outcome.placements if p.claim.key == key), None)
    if placement is not None:
        yield f"A {placement.estimate.gpu_class} GPU is free, and it gets it now."
    for preemption in outcome.preemptions:
        victim = preemption.victim
        if preemption.claim.key == key and preemption.finishing:
            gpu_class = preemption.estimate.gpu_class
            yield f"It gets the {gpu_class} GPU of {preemption.finishing}, which ends before anybody could make way."
        elif preemption.claim.key == key and victim is None:
            yield f"It gets the {preemption.estimate.gpu_class} GPU of a job that is stopping already."
        elif preemption.claim.key == key and victim is not None and preemption.onto:
            sooner = span(timedelta(seconds=preemption.gain_seconds))
            yield (
                f"{victim.key} makes room for it on {victim.gpu_class} and goes on on a free {preemption.onto} GPU: "
                f"that costs {victim.lost_seconds:.0f} GPU-seconds, and lets it start {sooner} sooner."
            )
        elif victim is not None and victim.key == key and preemption.onto:
            yield f"It makes room for {preemption.claim.key} and goes on on a free {preemption.onto} GPU."
        elif preemption.claim.key == key and victim is not None:
            yield f"{victim.key} makes way for it, which costs {victim.lost_seconds:.0f} GPU-seconds."
        elif victim is not None and victim.key == key:
            yield f"It makes way for {preemption.claim.key} and comes back to the queue."
    refusal = outcome.refusals.get(key)
    if refusal is not None and refusal.reason in _NOBODY_MAKES_WAY:
        yield _NOBODY_MAKES_WAY[refusal.reason]


def _protected(claim: Claim, outcome: Schedule, snapshot: Snapshot) -> Iterator[str]:
    """Who might make way for a job that waits, if that were not moved as often as it may be already."""
    refusal = outcome.refusals.get(claim.key)
    if refusal is None or refusal.reason is Reason.WAITING_FOR_PREEMPTION:
        return
    holders = (d for d in outcome.drafts.values() if any(_holds(d, name) for name in claim.classes))
    found = [(until, draft) for draft in holders if (until := protection_of(draft, snapshot.policy)) is not None]
    if found:
        until, draft = min(found, key=lambda each: (each[0], each[1].job.key))
        most = budget_words(draft.job.spec, snapshot.policy)
        others = f", and {len(found) - 1} more are" if len(found) > 1 else ""
        yield (
            f"{draft.job.key} may not be moved for {span(until - snapshot.now)}: its eviction budget of {most} is spent"
            f"{others and others + ' protected so'}."
        )


_NOBODY_MAKES_WAY = {
    Reason.WAITING_FOR_GPU: "Until one comes free only a job of lower priority could make way, and none may.",
    Reason.WAITING_FOR_QUOTA: "No job that would free this quota may be moved.",
}


def _when(ahead: Outlook, now: datetime) -> Iterator[str]:
    """When it is expected to start and to end."""
    expected = ahead.expected
    if expected is None and ahead.endless:
        yield f"When it starts cannot be told: nobody knows for how long {listed(ahead.endless)} will hold a GPU."
    elif expected is None:
        yield f"It is not expected to start within {span(ahead.until - now)}."
    elif expected.start is not None and ahead.early is not None:
        late = "later" if ahead.late is None else span(ahead.late - now)
        yield (
            f"It is expected to get a {expected.gpu_class} GPU in {span(expected.start - now)}: between "
            f"{span(ahead.early - now)} and {late}, if as much arrives as lately."
        )
    if expected is not None and expected.end is not None:
        yield f"Its last step is expected in {span(expected.end - now)}."


def _history(draft: Draft, policy: Policy) -> Iterator[str]:
    status = draft.status
    if status.evictions:
        told = ", ".join(f"{count} x {reason}" for reason, count in sorted(status.evictions.items()))
        yield f"It was moved before: {told}."
    most, spent = budget_words(draft.job.spec, policy), status.eviction_budget
    if most and spent is not None and spent.left is not None:
        renewed = f"; one more in {span(spent.renew_time - draft.now)}" if spent.renew_time is not None else ""
        yield f"Of its eviction budget of {most}, {spent.left} are left{renewed}."
    until = protection_of(draft, policy)
    if until is not None:
        yield f"It is not moved for others' sake for {span(until - draft.now)}."
    for known in status.setbacks:
        if known.reason.recovery is not Recovery.WAIT:
            used = counted_failures(status, known.reason)
            yield f"{used} of {draft.job.spec.backoff_limit} allowed failures for {known.reason.value} are used."
        else:
            yield f"{known.reason.value} has ended {known.count} attempts since its last checkpoint."
    avoided = avoided_classes(status, draft.now, policy)
    if avoided:
        yield f"Passed over for now, since they failed it lately: {', '.join(sorted(avoided))}."


def span(duration: timedelta) -> str:
    """As people say it."""
    minutes = duration.total_seconds() / 60
    if minutes < 2:
        return "a minute"
    if minutes < 60:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    told, more = names[:NAMES_TOLD], len(names) - NAMES_TOLD
    return ", ".join(told) + (f" and {more} more" if more > 0 else "")
