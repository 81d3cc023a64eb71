"""`qlora simulate --trace`: a trace on a cluster's queues and cards, held against schedules worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.errors import InvalidObject
from orchestrator.sdk.simulation import with_changes
from orchestrator.sdk.trace import groups_of, played, read_trace
from tests.builders import NOW, gpus, make_queue

RESTART_SECONDS = 60.0
POLICY = Policy(store_uri="file:///store", restart_cost_seconds=RESTART_SECONDS)


def cluster(**cards: int) -> Snapshot:
    return Snapshot(
        now=NOW, jobs=(), queues=(make_queue("default"), make_queue("night")), gpu_classes=gpus(**cards), policy=POLICY
    )


def trace(folder: Path, *rows: dict[str, object], form: str = "csv") -> Path:
    path = folder / f"trace.{form}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(out.getvalue())
    return path


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_one_card_serves_who_came_first_and_everybody_waits_for_those_before(tmp_path: Path, form: str) -> None:
    rows = [{"submit": 1000 + n, "user": f"user-{n % 2}", "gpuClass": "24Gi", "seconds": 600} for n in range(4)]
    present = cluster(_24Gi=1)
    found = played(present, None, read_trace(trace(tmp_path, *rows, form=form), present))
    each = 600 + RESTART_SECONDS
    waits = [fate.wait_seconds for fate in found.before.fates]
    assert waits == pytest.approx([n * each - n for n in range(4)], abs=1)
    assert found.before.seconds == pytest.approx(4 * each, abs=1)
    assert found.before.utilisation == pytest.approx({"24Gi": 1.0}, abs=0.01)
    every, first, second = groups_of(found.before)
    assert (every.user, every.jobs, first.jobs, second.jobs) == ("", 4, 2, 2)
    assert every.mean_wait_seconds == pytest.approx(sum(waits) / 4)  # pyright: ignore


def test_it_is_what_a_list_scheduler_makes_of_equal_jobs(tmp_path: Path) -> None:
    """On cards of one class, of one user's jobs without priorities, whoever came first takes the next free card."""
    draw = random.Random(7)
    rows = [
        {"submit": round(draw.uniform(0, 20_000), 3), "gpuClass": "24Gi", "seconds": draw.randint(400, 4000)}
        for _ in range(60)
    ]
    present = cluster(_24Gi=3)
    found = played(present, None, read_trace(trace(tmp_path, *rows), present)).before
    free = [0.0] * 3
    first = min(float(row["submit"]) for row in rows)
    expected: dict[int, float] = {}
    for place, row in sorted(enumerate(rows), key=lambda each: float(each[1]["submit"])):
        come = float(row["submit"]) - first
        card = min(range(3), key=lambda each: free[each])
        expected[place] = max(come, free[card])
        free[card] = expected[place] + float(row["seconds"]) + RESTART_SECONDS
    starts = [(fate.start - NOW).total_seconds() for fate in found.fates if fate.start is not None]
    assert starts == pytest.approx([expected[place] for place in range(len(rows))], abs=5)
    assert found.seconds == pytest.approx(max(free), abs=5)


def test_an_urgent_job_moves_another_which_is_counted_and_costs_a_restart(tmp_path: Path) -> None:
    rows = [
        {"submit": 0, "queue": "night", "gpuClass": "24Gi", "seconds": 7200, "due": 7300},
        {"submit": 3600, "gpuClass": "24Gi", "seconds": 600, "priority": 100, "due": 9000},
    ]
    present = cluster(_24Gi=1)
    found = played(present, with_changes(present, ["24Gi=+1"], []), read_trace(trace(tmp_path, *rows), present))
    night, urgent = found.before.fates
    assert (night.moves, night.missed, urgent.moves, urgent.missed) == (1, True, 0, False)
    assert urgent.wait_seconds is not None
    assert urgent.wait_seconds < 120
    assert found.after is not None
    assert [fate.moves for fate in found.after.fates] == [0, 0]
    assert [fate.missed for fate in found.after.fates] == [False, False]
    assert found.after.utilisation["24Gi"] < found.before.utilisation["24Gi"]


def test_quotas_hold_and_another_quota_shows(tmp_path: Path) -> None:
    present = replace(cluster(_24Gi=4), queues=(make_queue("default", {"24Gi": 1}),))
    rows = [{"submit": 0, "vram": "24Gi", "seconds": 600} for _ in range(4)]
    found = played(present, with_changes(present, [], ["default:24Gi=4"]), read_trace(trace(tmp_path, *rows), present))
    assert found.after is not None
    before, after = (groups_of(side)[0].mean_wait_seconds for side in (found.before, found.after))
    assert before == pytest.approx(1.5 * (600 + RESTART_SECONDS), abs=5)
    assert after == pytest.approx(0, abs=1)


def test_what_fits_no_card_never_starts(tmp_path: Path) -> None:
    present = cluster(_24Gi=1)
    found = played(
        present, None, read_trace(trace(tmp_path, {"submit": 0, "gpuClass": "48Gi", "seconds": 60}), present)
    )
    assert groups_of(found.before)[0].waiting == 1
    assert groups_of(found.before)[0].mean_wait_seconds is None


def test_times_may_be_dates(tmp_path: Path) -> None:
    rows = [
        {"submit": time, "gpuClass": "24Gi", "seconds": 60} for time in ("2026-11-30T17:00:00Z", "2026-11-30 17:30")
    ]
    present = cluster(_24Gi=1)
    first, second = read_trace(trace(tmp_path, *rows), present)
    assert first.come == NOW
    assert second.come - first.come == timedelta(minutes=30)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no job"),
        ("submit,gpuClass,seconds\n", "holds no job"),
        ("submit,gpuClass,seconds,colour\n0,24Gi,5,red\n", "line 1: colour: there is no such field"),
        ("submit,gpuClass,seconds\n0,24Gi,5\nsoon,24Gi,5\n", "line 3: submit: must be seconds or a time"),
        ("submit,gpuClass\n0,24Gi\n", "line 2: seconds: is missing"),
        ("submit,gpuClass,seconds\n0,24Gi,-5\n", "line 2: seconds: must be above 0"),
        ("submit,gpuClass,seconds\n0,24Gi,nan\n", "line 2: seconds: must be a number"),
        ("submit,gpuClass,seconds\n0,,5\n", "line 2: gpuClass: say which it may have"),
        ("submit,gpuClass,seconds\n0,24 Gi!,5\n", "line 2: gpuClass: "),
        ("submit,gpuClass,seconds\n0,24Gi,5,6\n", "line 2: has more fields than the header"),
        ("submit,gpuClass,seconds,queue\n0,24Gi,5,nobodys\n", "line 2: queue: there is no nobodys; there are default"),
        ("submit,gpuClass,seconds,user\n0,24Gi,5,Me\n", "line 2: user: "),
        ("submit,gpuClass,seconds,priority\n0,24Gi,5,1.5\n", "line 2: priority: must be a whole number"),
        ("submit,gpuClass,seconds,priority\n0,24Gi,5,9999999\n", "line 2: priority: "),
        ("submit,vram,seconds\n0,lots,5\n", "line 2: vram: "),
        ('{"submit": 0, "gpuClass": "24Gi", "seconds": 5}\n{"submit": 0,\n', "line 2: is not JSON"),
        ('{"submit": 0, "gpuClass": "24Gi", "seconds": 5}\n[]\n', "line 2: must be an object"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidObject, match=r"trace\.csv: ") as raised:
        read_trace(path, cluster(_24Gi=1))
    assert words in str(raised.value)
