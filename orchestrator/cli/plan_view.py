"""`qlora plan` on screen: the bytes item by item, the plan in words, and what every other class would mean."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import Estimate
from orchestrator.cli.output import Cell, Columns, print_columns, print_fields
from orchestrator.sdk.data_count import DataCount
from orchestrator.sdk.planning import Alternative, JobPlan
from orchestrator.sdk.words import NOTHING, dollars, duration, gib, length_words, plan_words, step_time
from orchestrator.sizing.hardware import CPU_CLASS

BAR_CELLS = 28
BEFORE_BAR_CELLS = 16
"""Of a line with a bar, without the item's name."""
LABEL_CELLS = 12
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_plan(console: Console, plan: JobPlan) -> None:
    """The whole plan of one job."""
    console.print(_heading(plan))
    if plan.chosen is not None:
        console.print()
        for line in _item_lines(plan.chosen, console):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
        console.print()
        print_fields(console, _choice_fields(plan.chosen, plan.data), LABEL_CELLS)
    if plan.guess is not None:
        console.print()
        console.print(Text.assemble(("a guess  ", "busy"), plan.guess))
    for note in plan.notes:
        console.print()
        console.print(Text.assemble(("note  ", "busy"), note))
    if plan.refusal is not None:
        console.print()
        console.print(Text.assemble(("cannot run here  ", "bad"), plan.refusal.message))
    console.print()
    if plan.unseen:
        told = "which GPUs are here is not this account's to read: every class is shown as if it were here"
        console.print(Text.assemble(("not seen  ", "busy"), told))
        console.print()
    print_columns(console, _alternatives(plan.alternatives), indent="  ")


def bar(share: float, cells: int = BAR_CELLS, *, unicode: bool = True) -> str:
    """A horizontal bar for a share between 0 and 1."""
    eighths = round(min(1.0, max(0.0, share)) * cells * 8)
    if not unicode:
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _heading(plan: JobPlan) -> Text:
    return Text.assemble((plan.job, "bold"), ("  " + _model_words(plan.facts), "quiet"))


def _model_words(facts: ModelFacts) -> str:
    mixture = facts.mixture
    experts = f", {mixture.experts_per_token} of {mixture.experts} experts" if mixture else ""
    shape = f"{facts.num_layers} layers, hidden {facts.hidden_size}{experts}, vocabulary {facts.vocab_size}"
    return f"{facts.architecture}, {shape}"


def _item_lines(estimate: Estimate, console: Console) -> Iterator[Text]:
    """Each item with its bar; the peak and what the class offers share the scale."""
    unicode = console.encoding.lower().startswith("utf")
    scale = max(estimate.usable_bytes, estimate.peak_bytes, 1)
    rows = [(item.name, item.bytes, "busy") for item in estimate.items if item.bytes]
    rows += [("peak", estimate.peak_bytes, "good"), (f"usable on {estimate.gpu_class}", estimate.usable_bytes, "quiet")]
    name_width = max(len(name) for name, _, _ in rows)
    cells = min(BAR_CELLS, max(0, console.width - name_width - BEFORE_BAR_CELLS)) if console.is_terminal else BAR_CELLS
    for name, count, style in rows:
        strong = "bold" if name == "peak" else ""
        yield Text.assemble(
            (f"  {name:<{name_width}}  ", strong),
            (f"{gib(count):>10}  ", strong),
            (bar(count / scale, cells, unicode=unicode), style),
        )


def _choice_fields(estimate: Estimate, data: DataCount | None) -> Iterator[tuple[str, str]]:
    """Class, plan, data and length."""
    free = estimate.usable_bytes - estimate.peak_bytes
    yield "GPU class", f"{_class_words(estimate)}, {gib(free)} to spare"
    yield "plan", plan_words(estimate.plan)
    if data is not None:
        yield "data", _data_words(data)
    yield "length", length_words(estimate, about=data is not None and not data.exact)


def _data_words(data: DataCount) -> str:
    counts = f"{data.records} records to train on in {data.sequences} sequences"
    return counts if data.exact else f"about {counts}, an estimate; prepare counts the tokens"


def _class_words(estimate: Estimate) -> str:
    return "cpu: no GPU is here, so it trains on the CPU" if estimate.gpu_class == CPU_CLASS else estimate.gpu_class


def _alternatives(alternatives: tuple[Alternative, ...]) -> Columns:
    numbers = ("HERE", "PEAK", "BATCH", "RECOMP.", "TIME", "PRICE")
    rows = [_alternative_row(alternative) for alternative in alternatives]
    return Columns(header=("CLASS", *numbers, "WHY"), rows=rows, right=numbers, optional=("RECOMP.",), wraps=True)


def _alternative_row(alternative: Alternative) -> list[Cell]:
    estimate = alternative.estimate
    chosen = alternative.remark == "chosen"
    style = "good" if chosen else "quiet" if alternative.capacity == 0 else ""
    texts = (
        alternative.gpu_class,
        str(alternative.capacity) if alternative.capacity is not None else NOTHING,
        gib(estimate.peak_bytes) if estimate is not None else NOTHING,
        str(estimate.plan.micro_batch_size) if estimate is not None else NOTHING,
        str(estimate.plan.recompute_layers) if estimate is not None else NOTHING,
        _time(estimate) if estimate is not None else NOTHING,
        dollars(estimate.dollars) if estimate is not None else NOTHING,
        alternative.remark,
    )
    return [Cell(text=text, style=style) for text in texts]


def _time(estimate: Estimate) -> str:
    """The time of all steps, or of one where nobody has counted them yet."""
    if estimate.seconds is not None or estimate.step_seconds is None:
        return duration(estimate.seconds)
    return f"{step_time(estimate.step_seconds)}/step"
