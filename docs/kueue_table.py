"""The table of docs/performance.md that holds the controller beside Kueue, from what `benchmarks.kueue` has saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "performance.md"
RESULTS = Path(__file__).parents[1] / "benchmarks/results/kueue.json"
BEGIN, END = "<!-- kueue: written by `make docs` -->\n", "<!-- end of kueue -->"
LIMITS = {"limit_50_100": "50 / 100", "limit_300_500": "300 / 500", "no_limit": "none"}
SIDES = {"kueue_baseline": "Kueue, its baseline", "kueue": "Kueue, one unit each", "ours": "ours, one GPU each"}
Row = Mapping[str, Any]  # Any: JSON


def page() -> str:
    """The page with the table as it should be."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "docs/performance.md has lost the place of its table of Kueue"
    return f"{before}{begin}{table(json.loads(RESULTS.read_text())['results'])}\n{end}{after}"


def table(results: Row) -> str:
    """A row for each limit and side."""
    head = (
        "limit",
        "who",
        "a second",
        "mean wait, s: small",
        "medium",
        "large",
        "quota held",
        "at work",
        "requests each",
        "CPU each, ms",
        "API server's, ms",
        "MiB",
        "load",
    )
    rows = [head, tuple("---" for _ in head), *_rows(results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows(results: Row) -> Iterator[tuple[str, ...]]:
    for limit, told in LIMITS.items():
        for side, who in SIDES.items():
            if (found := results.get(limit, {}).get(side)) is not None:
                yield told, who, *_cells(found)


def _cells(found: Row) -> Iterator[str]:
    count: int = found["workloads"]
    yield f"{found['workloads_per_second']:.1f}"
    for name in ("small", "medium", "large"):
        yield f"{found['wait_seconds'][name]['mean']:.1f}"
    yield f"{found['quota_held']:.0%}"
    yield f"{found['quota_worked']:.0%}"
    yield f"{found['requests_per_workload']:.1f}"
    yield f"{found['cpu_seconds'] * 1000 / count:.0f}"
    yield f"{found['api_server_cpu_seconds'] * 1000 / count:.0f}"
    yield f"{found['peak_mib']:.0f}"
    yield f"{(found['load_average_before'] + found['load_average_after']) / 2:.0f}"
