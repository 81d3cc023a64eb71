"""Training records for people: what carries loss in color on a terminal, in ⟦ ⟧ everywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from orchestrator.api.formats import ShownRecord, ShownRecords
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.record_fields import CHAT_FORMATS
from orchestrator.cli.output import print_text

OPENING, CLOSING = "⟦", "⟧"


def show_records(console: Console, shown: ShownRecords) -> None:
    """Each record with its counts; wrapped to the terminal, whole in a pipe."""
    colored = console.is_terminal and console.color_system is not None
    for number, record in enumerate(shown.records, start=1):
        answer = f", {record.answer}" if record.answer is not None else ""
        counts = f"record {number}{answer}: {record.tokens} tokens, {record.supervised_tokens} of them with loss"
        if colored:
            console.print(Text(counts, style="label"))
            console.print(_in_color(record))
        elif console.is_terminal:
            console.print(Text(f"{counts}\n{in_brackets(record)}"))
        else:
            print_text(f"{counts}\n{in_brackets(record)}\n")


def legend(console: Console) -> str:
    """How to read the records on this console."""
    colored = console.is_terminal and console.color_system is not None
    return f"what carries loss is {'green' if colored else f'between {OPENING} and {CLOSING}'}, the rest is context"


def template_words(spec: QLoRAJobSpec) -> str:
    """Which chat template writes the records."""
    if spec.dataset.format == "preference":
        return "chat template: of answers that are messages the job's or the model's, of texts none"
    if spec.dataset.format not in CHAT_FORMATS:
        return f"chat template: none, records of the format {spec.dataset.format} are trained as they stand"
    template = spec.model.chat_template
    if template is None:
        return f"chat template: the one of {spec.model.source}"
    name = "the text" if "{" in template else template
    return f"chat template: {name} in spec.model.chatTemplate"


def in_brackets(record: ShownRecord) -> str:
    """The text of a record without color."""
    return "".join(f"{OPENING}{part.text}{CLOSING}" if part.supervised else part.text for part in record.parts)


def _in_color(record: ShownRecord) -> Text:
    text = Text()
    for part in record.parts:
        text.append(part.text, style="good" if part.supervised else "quiet")
    return text.append("\n")
