"""How right the memory model is on the rows that `benchmarks.sizing` measured on a GPU.

    python -m benchmarks.sizing_report [--rows benchmarks/results/sizing_rows.jsonl] [--save sizing]

For each architecture: predicted peak over measured peak of PyTorch's allocator, less one, in per cent. The model's
constants were read off the trainer's and the libraries' code; two things were set with rows in sight, the margin and
corrections of the walk where rows showed a tensor that it had missed. `fitted` are the architectures on which that was
done, `held_out` the others. Then what the allocator reserved: over the predicted peak, and over what is predicted to be
reserved, where the one number for layers that transformers computes is fitted on `fitted`. And what whole models take
under the cap of a GPU class, against LoRA on a 16-bit base.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.estimators import QLORA_PARTS, ROWS, Row, ours
from benchmarks.report import argument_parser, emit

FITTED = frozenset(
    {
        *("smollm2-135m", "qwen3-0.6b", "pythia-6.9b", "gemma-2-2b", "gemma-3-1b"),
        *("olmo-2-7b", "granite-3.1-8b", "phi-3-mini-3.8b", "starcoder2-7b"),
    }
)
GIB = 1 << 30
RESERVED_WITHIN = 4.0


def main() -> None:
    """Judge the rows and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS)
    arguments = parser.parse_args()
    emit(report([json.loads(line) for line in arguments.rows.read_text().splitlines()]), save=arguments.save)


def report(raw: list[dict[str, Any]]) -> dict[str, object]:
    """All of it."""
    rows = [(each, row) for each in raw if (row := Row.read(each)) is not None]
    by_model: dict[str, list[float]] = defaultdict(list)
    for _, row in rows:
        by_model[row.model].append(error(row))
    return {
        "card": sorted({each["card"] for each in raw}),
        "commit": sorted({each["commit"] for each in raw}),
        "rows": len(rows),
        "architectures": len(by_model),
        "all": summary(error for errors in by_model.values() for error in errors),
        "fitted": summary(error for model, errors in by_model.items() if model in FITTED for error in errors),
        "held_out": summary(error for model, errors in by_model.items() if model not in FITTED for error in errors),
        "by_model": {model: summary(errors) for model, errors in sorted(by_model.items())},
        "too_small": [described(each, error(row)) for each, row in rows if error(row) < 0],
        "reserved_over_predicted_peak_percent": summary(
            100 * (row.reserved_bytes / ours(row, margin=True) - 1) for _, row in rows
        ),
        "reserved_over_predicted_percent": reserved(rows),
        "refused": sorted({f"{each['model']}: {each.get('refused') or each['error']}" for each in raw if failed(each)}),
        "whole": {name: whole(each, row) for each, row in rows if (name := named(each)) and row.part == "whole"},
        "against_16_bit_lora": against_16_bits(raw),
    }


def reserved(rows: list[tuple[dict[str, Any], Row]]) -> dict[str, object]:
    """What the allocator reserved over what is predicted for it."""
    errors = [(each, row, reserved_error(row)) for each, row in rows]
    outside = sorted((found, described(each, found), cause(each, row)) for each, row, found in errors)
    return {
        "all": summary(found for *_, found in errors),
        "fitted": summary(found for _, row, found in errors if row.model in FITTED),
        "held_out": summary(found for _, row, found in errors if row.model not in FITTED),
        "rehearsed": summary(found for each, row, found in errors if rehearsed(each, row)),
        "not_rehearsed": summary(found for each, row, found in errors if not rehearsed(each, row)),
        "share_within_4_percent": round(sum(abs(found) <= RESERVED_WITHIN for *_, found in errors) / len(errors), 3),
        "outside": [f"{words} ({why})" for found, words, why in outside if abs(found) > RESERVED_WITHIN],
    }


def reserved_error(row: Row) -> float:
    """Reserved against predicted, in per cent; above zero more was reserved."""
    wanted = row.footprint().reserved_bytes(row.plan.recompute_layers, evaluates=row.evaluates)
    predicted = min(wanted, row.card_bytes)
    return 100 * (row.reserved_bytes / predicted - 1)


def rehearsed(raw: dict[str, Any], row: Row) -> bool:
    """Whether each tensor was given its place: where layers are computed by hand, and have no experts."""
    return bool(raw["fused"]) and row.facts.mixture is None


def cause(raw: dict[str, Any], row: Row) -> str:
    """Why a row can be far from what is predicted to be reserved."""
    if rehearsed(raw, row):
        return "not known"
    return "a share stands for its holes, as the order of transformers' tensors, or of experts' own, is not rehearsed"


def error(row: Row) -> float:
    """Predicted against measured, in per cent; below zero a job would have asked for too small a card."""
    return 100 * (ours(row, margin=True) / row.measured_bytes - 1)


def summary(errors: Iterable[float]) -> dict[str, float]:
    """How large errors are, in per cent."""
    found = list(errors)
    return {
        "rows": len(found),
        "mean": round(mean(abs(each) for each in found), 3),
        "least": round(min(found), 3),
        "most": round(max(found), 3),
    }


def failed(raw: dict[str, Any]) -> bool:
    """Whether the trainer refused the job, or it broke."""
    return raw["part"] in QLORA_PARTS and ("refused" in raw or "error" in raw)


def named(raw: dict[str, Any]) -> str:
    """A model and its case, in words and without dots, which separate keys in targets.toml."""
    adapter, training, plan = raw["adapter"], raw["training"], raw["plan"]
    layers = min(plan["recomputeLayers"], raw["config"]["num_hidden_layers"])
    model = raw["model"].replace(".", "_")
    return f"{model} r={adapter['rank']} {training['sequenceLength']} tokens, {layers} layers recomputed"


def described(raw: dict[str, Any], percent: float) -> str:
    """A row that is far off, for whoever looks for the cause."""
    plan = raw["plan"]
    return (
        f"{named(raw)}, {plan['microBatchSize']} x {plan['accumulationSteps']}, offload {plan['offload']}, "
        f"targets {raw['adapter']['targetModules']}: {percent:+.2f} %"
    )


def whole(raw: dict[str, Any], row: Row) -> dict[str, float]:
    """GiB of a model with all its layers."""
    return {
        "cap_gib": raw["cap_gib"],
        "predicted_gib": round(ours(row, margin=True) / GIB, 3),
        "measured_gib": round(row.measured_bytes / GIB, 3),
        "reserved_gib": round(raw["peak_reserved_bytes"] / GIB, 3),
        "step_seconds": raw["step_seconds"],
    }


def against_16_bits(raw: list[dict[str, Any]]) -> dict[str, object]:
    """The share of memory saved against PEFT's LoRA on a bfloat16 base, with and without its gradient checkpointing."""
    found: dict[str, object] = {}
    peaks = {
        (each["part"], each["model"], each["adapter"]["rank"], each["plan"]["recomputeLayers"]): each
        for each in raw
        if "peak_allocated_bytes" in each and each["part"] in ("whole", "lora16")
    }
    for (part, model, rank, recompute), theirs in peaks.items():
        own = peaks.get(("whole", model, rank, 1024))
        if part == "lora16" and own is not None:
            which = "with" if recompute else "without"
            found[f"{model.replace('.', '_')} r={rank}, 16-bit {which} checkpointing"] = {
                "lora_16_bit_gib": round(theirs["peak_allocated_bytes"] / GIB, 3),
                "qlora_gib": round(own["peak_allocated_bytes"] / GIB, 3),
                "saved": round(1 - own["peak_allocated_bytes"] / theirs["peak_allocated_bytes"], 4),
            }
    return found


if __name__ == "__main__":
    main()
