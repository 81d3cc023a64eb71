"""What a train stage tells of itself before its first step, which for a large base is the longest wait of all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from orchestrator.api.results import ProgressReport
from qlora_trainer.training.stop import AgentClient

Tell = Callable[[str], None]


def teller(agent: AgentClient | None) -> Tell:
    """Tells the agent, if there is one, in words; no steps are claimed, since how far the job is, is not known yet."""

    def tell(detail: str) -> None:
        if agent is not None:
            agent.report(ProgressReport(stage="train", detail=detail, time=datetime.now(tz=UTC)))

    return tell


@contextmanager
def weights_told(tell: Tell) -> Generator[None]:
    """Tell how much of a checkpoint is loaded, by way of the bar that transformers would draw into the log."""
    transformers_logging: Any = import_module("transformers.utils.logging")
    tell("loading weights")

    def bar(_factory: object, args: tuple[Any, ...], _options: object) -> object:
        return _ToldItems(transformers_logging.EmptyTqdm, args, tell)

    previous = transformers_logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _ToldItems:
    """Items that tell how many per cent of them have been taken; otherwise a bar that is not drawn."""

    def __init__(self, silent: Callable[..., Any], args: tuple[Any, ...], tell: Tell) -> None:
        self._silent = silent(*args)
        self._items: Any = args[0] if args else ()
        self._tell = tell

    def __iter__(self) -> Iterator[Any]:
        total, told = len(self._items) if hasattr(self._items, "__len__") else 0, -1
        for number, item in enumerate(self._items):
            percent = 100 * number // total if total else 0
            if percent != told:
                told = percent
                self._tell(f"loading weights: {percent} %")
            yield item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._silent, name)

    def __enter__(self) -> _ToldItems:
        return self

    def __exit__(self, *_: object) -> None:
        return
