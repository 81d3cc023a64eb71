"""How right traces are: jobs of model types without a table, measured on an H200, and what is predicted of them.

    python -m benchmarks.traced_report [--save traced] [--write]

An error is predicted over measured peak of PyTorch's allocator, less one, in per cent, as jobs are sized. Traces were
worked out on `untabled_rows.jsonl`. The jobs of `held_out_rows.jsonl` were drawn by other seeds and measured once that
was done; nothing is fitted to them, though three faults of the walk through a step showed in them, which are mended.
`guess` is what the jobs of both would have been sized by without a trace, like Llama's. `--write` brings the table of
docs/memory.md up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.estimators import ROWS, Row
from benchmarks.report import argument_parser, emit
from benchmarks.sizing_report import RESERVED_WITHIN, error, reserved_error
from orchestrator.api.layer_tables import has_table

HELD_OUT = ROWS.with_name("held_out_rows.jsonl")
WORKED_OUT = ROWS.with_name("untabled_rows.jsonl")
WHOLE = ROWS.with_name("whole_h200_rows.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- traced: written by `python -m benchmarks.traced_report --write` -->", "<!-- end of traced -->"
HYBRIDS = frozenset({"granitemoehybrid", "lfm2", "qwen3_5", "qwen3_next", "qwen3_5_moe", "qwen3_5_text"})
HYBRID, ONE_BY_ONE = "hybrids (delta nets, Mamba-2, short convolutions)", "others whose records go one by one"
DORA, ON_EXPERTS, MIXTURES, OTHERS = (
    "DoRA, packed rows",
    "LoRA on routed experts",
    "LoRA, mixtures",
    "LoRA, dense models",
)
KINDS = (OTHERS, MIXTURES, ON_EXPERTS, DORA, ONE_BY_ONE, HYBRID)
Pair = tuple[dict[str, Any], Row]


def main() -> None:
    """Judge the rows, and print or write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="write the table of docs/memory.md, and print nothing")
    arguments = parser.parse_args()
    if arguments.write:
        PAGE.write_text(page())
    else:
        emit(report(), save=arguments.save)


def report() -> dict[str, object]:
    """All of it."""
    held_out, worked_out, whole = (list(traced(path)) for path in (HELD_OUT, WORKED_OUT, WHOLE))
    by_kind = {name: [pair for pair in held_out if kind(*pair) == name] for name in KINDS}
    return {
        "card": sorted({raw["card"] for raw, _ in held_out}),
        "held_out": judged(held_out),
        "held_out_by_kind": {name: judged(pairs) for name, pairs in by_kind.items()},
        "worked_out": judged(worked_out),
        "whole": judged(whole),
        "guess": guessed([*held_out, *worked_out]),
    }


def traced(path: Path) -> Iterator[Pair]:
    """The jobs of a file that ran to their end and have a trace."""
    for line in path.read_text().splitlines():
        raw = json.loads(line)
        row = Row.read(raw) if raw.get("trace") else None
        if row is not None:
            yield raw, _as_traced(row)


def _as_traced(row: Row) -> Row:
    """A job as one of a type without a table: it ran before there was one, with transformers' layers."""
    facts, adapter = row.facts, row.spec.adapter
    if not has_table(facts.model_type, use_dora=adapter.use_dora, experts=adapter.experts):
        return row
    return replace(row, facts=facts.model_copy(update={"model_type": f"{facts.model_type} of transformers"}))


def kind(raw: dict[str, Any], row: Row) -> str:
    """What a job is told with."""
    if raw["separate"]:
        return HYBRID if row.facts.model_type in HYBRIDS else ONE_BY_ONE
    if row.spec.adapter.use_dora:
        return DORA
    if row.spec.adapter.experts:
        return ON_EXPERTS
    return OTHERS if row.facts.trace is None or not any(each.experts for each in row.facts.trace.kinds) else MIXTURES


def judged(pairs: Iterable[Pair]) -> dict[str, object]:
    """Errors of the predicted peak, and how many jobs reserved about what is predicted for that."""
    rows = [row for _, row in pairs]
    reserved = [abs(reserved_error(row)) for row in rows]
    within = sum(each <= RESERVED_WITHIN for each in reserved) / len(rows)
    return {
        **errors([error(row) for row in rows]),
        "models": len({row.model for row in rows}),
        "reserved_within_4_percent": round(within, 3),
        "reserved_worst": round(max(reserved), 1),
    }


def guessed(pairs: Iterable[Pair]) -> dict[str, object]:
    """The errors of guesses."""
    rows = [row for _, row in pairs]
    found = [error(replace(row, facts=row.facts.model_copy(update={"trace": None}))) for row in rows]
    return {**errors(found), "models": len({row.model for row in rows}), "under": sum(each < 0 for each in found)}


def errors(found: list[float]) -> dict[str, object]:
    """How large they are, in per cent."""
    return {
        "jobs": len(found),
        "mean": round(mean(map(abs, found)), 2),
        "least": round(min(found), 2),
        "most": round(max(found), 2),
    }


def page() -> str:
    """docs/memory.md with the table as the rows have it now."""
    text = PAGE.read_text()
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{head}{BEGIN}\n{table(report())}\n{tail}"


def table(found: dict[str, Any]) -> str:
    """The errors as Markdown."""
    by_kind = found["held_out_by_kind"]
    lines = {
        "**jobs held out**": found["held_out"],
        **{f"- {name}": by_kind[name] for name in KINDS},
        "**jobs that traces were worked out on**": found["worked_out"],
        "**whole models**": found["whole"],
        "all but these, sized like Llama's: a guess": found["guess"],
    }
    head = (
        "| predicted over measured peak | jobs | mean error | least | most | reserved within 4 % |",
        "|---|---|---|---|---|---|",
    )
    return "\n".join((*head, *(_line(name, each) for name, each in lines.items())))


def _line(name: str, found: dict[str, Any]) -> str:
    within = found.get("reserved_within_4_percent")
    share = "" if within is None else f"{within:.0%}".replace("%", " %")
    least, most = (f"{found[name]:+.2f} %" for name in ("least", "most"))
    return f"| {name} | {found['jobs']} | {found['mean']:.2f} % | {least} | {most} | {share} |"


if __name__ == "__main__":
    main()
