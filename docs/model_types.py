"""The tables of docs/models.md: which types of models train, and how, and what prepare says of the others.

What was tried is in `benchmarks/results/models.json` (`python -m benchmarks.models`); whose layers' bytes are known
before prepare, the code says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.api.layer_tables import has_table

PAGE = Path(__file__).parent / "models.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "models.json"
Row = Mapping[str, Any]


def page() -> str:
    """The page with its tables as they should be."""
    rows: Mapping[str, Row] = json.loads(RESULTS.read_text())["types"]
    text = PAGE.read_text()
    for name, lines in (("trained", trained(rows)), ("refused", refused(rows))):
        before, begin, rest = text.partition(f"<!-- {name}: written by `make docs` -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        assert end, f"docs/models.md has lost the place of its table of {name} types"
        text = f"{before}{begin}{lines}\n{end}{after}"
    return text


def trained(rows: Mapping[str, Row]) -> str:
    """The types that train: how, and how far from the truth, beside plain QLoRA."""
    lines = [
        "| type | records | layers | their bytes | LoRA on experts | gradients off by | plain QLoRA's |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type, row in rows.items():
        if row["verdict"] == "trained":
            layers = "by hand" if row["hand_written"] else "transformers"
            text_type = row.get("text_type", model_type)
            known = "a table" if has_table(text_type, use_dora=False, experts=False) else "prepare"
            on_experts = {None: "", True: "yes", False: "no"}[row.get("expert_adapters")]
            ours, theirs = row["off"]["gradients"]
            cells = (f"`{model_type}`", row["mode"], layers, known, on_experts, f"{ours:.2%}", f"{theirs:.2%}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def refused(rows: Mapping[str, Row]) -> str:
    """The types that do not, and what prepare says of a model of each."""
    reasons = {name: row["reason"] for name, row in rows.items() if row["verdict"] == "refused"}
    lines = [f"| `{name}` | {reason.replace('|', ' ')} |" for name, reason in reasons.items()]
    return "\n".join(["| type | why |", "|---|---|", *lines])
