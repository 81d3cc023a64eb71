"""What commands print on terminals of 80 and 120 columns, to the letter, in `tests/cli/screens` for people to read.

QLORA_WRITE_SCREENS=1 python -m pytest tests/cli/test_screens.py      writes them anew
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from orchestrator.cli.console import THEME
from orchestrator.cli.plan_view import show_plan
from orchestrator.sdk import Client
from orchestrator.sizing.hardware import GpuClass, cpu_class, gpu_class
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up

SCREENS = Path(__file__).with_name("screens")
WRITE = "QLORA_WRITE_SCREENS" in os.environ
GPUS = (gpu_class("24Gi", capacity=2), gpu_class("48Gi", capacity=1))
CPU = (cpu_class(64 << 30, capacity=1),)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    """A service that counts as up."""
    return service_that_is_up(tmp_path, monkeypatch)


def plan_on(classes: tuple[GpuClass, ...], **spec: object) -> Callable[[PaperService, Console], None]:
    """`qlora plan` of a job where these classes are."""

    def draw(service: PaperService, console: Console) -> None:
        service.classes = classes
        settings = service.settings.model_copy(update={"gpu_prices": "24Gi=0.5,48Gi=0.8"})
        show_plan(console, Client(settings, connection=service.connection).plan(job_document(**spec)))

    return draw


DRAWN: dict[str, Callable[[PaperService, Console], None]] = {
    "plan": plan_on(GPUS),
    "plan-long": plan_on(GPUS, training={"sequenceLength": 32768}),
    "plan-cpu": plan_on(CPU),
}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", list(DRAWN))
def test_a_screen_is_as_it_was_read(service: PaperService, name: str, columns: int) -> None:
    console = Console(
        theme=THEME, file=io.StringIO(), width=columns, force_terminal=True, color_system=None, highlight=False
    )
    DRAWN[name](service, console)
    assert isinstance(console.file, io.StringIO)
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
    path = SCREENS / f"{name}-{columns}.txt"
    if WRITE:
        path.write_text(text)
    assert max(map(cell_len, text.splitlines())) <= columns, "a terminal would wrap it"
    assert text == path.read_text()
