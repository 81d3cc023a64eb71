"""Draws docs/measured.svg, the README's picture, and docs/moves.svg from the committed results.

    python -m benchmarks.pictures

Drawn on the data of `benchmarks.sizing`, `plans`, `peers` and `loss_curve`; and on that of `benchmarks.policies`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator

from benchmarks.estimators import ROWS, ours, read_rows
from benchmarks.report import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "measured.svg"
MOVES = PICTURE.with_name("moves.svg")
SCHEDULERS = {
    "fifo": "first come, first served",
    "easy": "EASY backfill, no moves",
    "priority-only": "victims by priority alone",
    "kueue": "Kueue's order and victims",
    "ours": "this controller",
}
"""What `benchmarks.policies` compares, by what it is called."""
OURS, OTHERS = "#1f77b4", "#9a9a9a"
GIB = 1 << 30
SMOOTHED_STEPS = 5
STACKS = {
    ("recipe", "2048x4"): "transformers, PEFT,\nbitsandbytes",
    ("llamafactory", "2048x4"): "LLaMA-Factory",
    ("unsloth", "2048x4"): "unsloth",
    ("unsloth", "2048x4/0"): "unsloth, told not\nto recompute",
    ("trainer", "2048x4"): "this trainer",
}
"""Each stack and its case, by what it is called."""


def main() -> None:
    """One picture of four parts."""
    # Text stays text, and the same data gives the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": PICTURE.name})
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"})
    figure, ((memory, plans), (speed, loss)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    draw_memory(memory)
    draw_plans(plans, result("plans"))
    draw_speed(speed, result("peers_8b"))
    draw_loss(loss, result("loss_curve"))
    save(figure, PICTURE)
    save(drawn_moves(result("policies")), MOVES)


def save(figure: Figure, picture: Path) -> None:
    """Without what is of no use, and without the day."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


def drawn_moves(results: dict[str, Any]) -> Figure:
    """What moves cost, and what jobs wait for, by scheduler: a row of pictures for each trace."""
    tables = {name.partition(",")[0]: each for name, each in results["traces"].items() if "periodic" in name}
    figure, grid = plt.subplots(len(tables), 3, figsize=(11, 2.4 * len(tables)), layout="constrained", squeeze=False)
    for row, (trace, table) in zip(grid, tables.items(), strict=True):
        shown = {name: title for name, title in SCHEDULERS.items() if name in table}
        draw_bars(row[0], table, shown, "lost_gpu_seconds", f"{trace}: GPU-hours lost to moves")
        draw_bars(row[1], table, shown, "mean_wait_seconds", "hours that a job waits, on average")
        draw_bars(row[2], table, shown, "high_priority_p99_wait_seconds", "of high priority, 99th percentile")
        for axes in row[1:]:
            axes.set_yticklabels([])
    return figure


def draw_bars(axes: Axes, table: dict[str, Any], shown: dict[str, str], field: str, title: str) -> None:
    """A bar of hours for each scheduler, with its figure."""
    hours = [table[name][field] / 3600 for name in shown]
    bars = axes.barh(list(shown.values()), hours, color=[OURS if name == "ours" else OTHERS for name in shown])
    axes.bar_label(bars, labels=[f"{each:.1f}" if each >= 1 else f"{each:.2g}" for each in hours], padding=3)
    axes.set_title(title)
    axes.margins(x=0.15)


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def draw_memory(axes: Axes) -> None:
    """How far the predicted peak of every job that was run for it is off, margin included; below 0 it would not fit."""
    rows = list(read_rows(ROWS))
    errors = [100 * (ours(row, margin=True) / row.measured_bytes - 1) for row in rows]
    axes.axhline(0, color=OTHERS, linewidth=0.8)
    axes.scatter([row.measured_bytes / GIB for row in rows], errors, s=9, color=OURS, alpha=0.5, linewidths=0)
    axes.set(xscale="log", xlabel="measured peak, GiB", ylabel="predicted over measured, less 1, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Memory: error of {len(rows)} predictions, {len({row.model for row in rows})} models")


def draw_plans(axes: Axes, plans: dict[str, Any]) -> None:
    """The chosen plan of each question, and the rivals' times over its time; to the left of 1 a rival was faster."""
    names = list(plans["answers"])
    for place, name in enumerate(names):
        chosen, *rivals = (plan.get("step_seconds") for plan in plans["answers"][name]["plans"])
        times = [seconds / chosen for seconds in rivals if seconds is not None]
        axes.scatter(times, [place] * len(times), s=16, color=OTHERS)
        axes.scatter([1], [place], s=30, color=OURS, zorder=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="seconds a step, over the chosen plan's")
    axes.xaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 4, 5]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("Plans: the chosen one (blue) and its rivals")


def draw_speed(axes: Axes, peers: dict[str, Any]) -> None:
    """Tokens a second of everybody as each comes, and the memory that it took for that."""
    cases = [peers["stacks"][stack]["cases"][case] for stack, case in STACKS]
    speeds = [case["tokens_per_second"] for case in cases]
    colors = [OURS if stack == "trainer" else OTHERS for stack, _ in STACKS]
    bars = axes.barh(list(STACKS.values()), speeds, color=colors, height=0.55)
    told = [f"{case['tokens_per_second']:,.0f}, {case['peak_reserved_gib']:.0f} GiB" for case in cases]
    axes.bar_label(bars, told, padding=4)
    axes.set(xlabel="tokens a second, and memory reserved", xlim=(0, max(speeds) * 1.35))
    axes.xaxis.set_major_locator(MultipleLocator(5000))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Speed: Llama 3.1 8B's shape, 4 x 2,048 tokens, one H100")


def draw_loss(axes: Axes, curve: dict[str, Any]) -> None:
    """Both losses, step by step."""
    for name, label, color in (
        ("recipe", "transformers, PEFT, bitsandbytes", OTHERS),
        ("trainer", "this trainer", OURS),
    ):
        losses = curve["curves"][name]
        means = [
            sum(losses[step - SMOOTHED_STEPS : step]) / SMOOTHED_STEPS
            for step in range(SMOOTHED_STEPS, len(losses) + 1)
        ]
        axes.plot(range(SMOOTHED_STEPS, len(losses) + 1), means, color=color, label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED_STEPS} steps")
    axes.set_title("Loss: SmolLM2-135M, same rows, same start")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
