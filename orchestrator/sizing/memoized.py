"""Pure functions of contract objects that remember their answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def remembered(answers_kept: int) -> Callable[[Callable[Arguments, Answer]], Callable[Arguments, Answer]]:
    """`lru_cache` for arguments that are pydantic models: frozen ones have a hash, which type checkers do not see."""

    def wrap(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
        cached: Any = lru_cache(maxsize=answers_kept)(function)  # Any: its own type asks for Hashable
        return cached

    return wrap
