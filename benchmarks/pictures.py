"""Draws docs/measured.svg, the README's picture, from the committed results.

    python -m benchmarks.pictures

Drawn on the data of `benchmarks.sizing`, `plans`, `peers` and `loss_curve`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.estimators import ROWS, ours, read_rows
from benchmarks.report import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "measured.svg"
OURS, OTHERS = "#1f77b4", "#9a9a9a"
GIB = 1 << 30
SMOOTHED_STEPS = 5
CASE = "2048x4"
STACKS = {
    "recipe": "transformers, PEFT,\nbitsandbytes",
    "llamafactory": "LLaMA-Factory",
    "unsloth": "unsloth",
    "trainer": "this trainer",
}


def main() -> None:
    """One picture of four parts."""
    # Text stays text, and the same data gives the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": PICTURE.name})
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"})
    figure, ((memory, plans), (speed, loss)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    draw_memory(memory)
    draw_plans(plans, result("plans"))
    draw_speed(speed, result("peers_8b"))
    draw_loss(loss, result("loss_curve"))
    for axes in (memory, plans, speed, loss):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, metadata={"Date": None})


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def draw_memory(axes: Axes) -> None:
    """Predicted and measured peaks of every job that was run for it."""
    rows = list(read_rows(ROWS))
    measured = [row.measured_bytes / GIB for row in rows]
    axes.plot([0.3, 60], [0.3, 60], color=OTHERS, linewidth=0.8)
    axes.scatter(measured, [ours(row, margin=True) / GIB for row in rows], s=9, color=OURS, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="measured peak, GiB", ylabel="predicted peak, GiB")
    axes.set_title(f"{len(rows)} jobs, {len({row.model for row in rows})} models: predicted and measured")


def draw_plans(axes: Axes, plans: dict[str, Any]) -> None:
    """The chosen plan of each question, and the rivals' times over its time."""
    names = list(plans["answers"])
    for place, name in enumerate(names):
        chosen, *rivals = (plan.get("step_seconds") for plan in plans["answers"][name]["plans"])
        times = [seconds / chosen for seconds in rivals if seconds is not None]
        axes.scatter(times, [place] * len(times), s=16, color=OTHERS)
        axes.scatter([1], [place], s=30, color=OURS, zorder=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step, over the chosen plan's")
    axes.set_title("The chosen memory plan (blue) and its rivals")


def draw_speed(axes: Axes, peers: dict[str, Any]) -> None:
    """Tokens a second of everybody, as each comes."""
    stacks = {name: peers["stacks"][name]["cases"][CASE]["tokens_per_second"] for name in STACKS}
    colors = [OURS if name == "trainer" else OTHERS for name in STACKS]
    bars = axes.barh(list(STACKS.values()), list(stacks.values()), color=colors, height=0.5)
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in stacks.values()], padding=4)
    axes.set(xlabel="tokens a second", xlim=(0, max(stacks.values()) * 1.15))
    axes.set_title("Llama 3.1 8B's shape, 4 x 2,048 tokens, one H100, one run")


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
    axes.set_title("SmolLM2-135M: same rows, same start")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
