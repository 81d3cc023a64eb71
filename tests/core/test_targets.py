"""What is claimed of measured figures: a promise is met, or missed and said to be."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from benchmarks.targets import HERE, Verdict, judge, summary

MET = Verdict(
    what="speed",
    headline="",
    bound="at least",
    target=2.0,
    unit="",
    measured=2.5,
    spread=None,
    note="",
    limit="",
    card="",
    command="",
)
LIMIT = "attention takes longer"


@pytest.mark.parametrize(
    ("verdict", "holds", "said"),
    [
        (MET, True, "1 of 1 targets met"),
        (replace(MET, measured=1.0), False, "0 of 1 targets met\nMISSED: speed"),
        (replace(MET, measured=1.0, limit=LIMIT), True, f"0 of 1 targets met\nknown limit: speed ({LIMIT})"),
        (replace(MET, limit=LIMIT), False, "1 of 1 targets met\nmet, but listed as a known limit: speed"),
        (replace(MET, measured=None, limit=LIMIT), False, "0 of 1 targets met\nMISSED: speed"),
    ],
    ids=["met", "missed", "missed and said", "met and said to be missed", "never measured"],
)
def test_a_claim_holds_where_the_promise_is_met_or_its_miss_is_known(verdict: Verdict, holds: bool, said: str) -> None:
    assert (verdict.holds, summary([verdict])) == (holds, said)


def test_what_is_committed_holds() -> None:
    verdicts = [judge(entry) for entry in tomllib.loads((HERE / "targets.toml").read_text())["target"]]

    assert [verdict.what for verdict in verdicts if not verdict.holds] == []
    assert any(verdict.limit for verdict in verdicts), "what is not reached yet is among them"
