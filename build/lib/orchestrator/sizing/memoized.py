"""Pure functions of contract objects that keep their results."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def memoized(results_kept: int) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """`lru_cache` for arguments that are pydantic models: frozen ones have a hash, which type checkers do not see."""

    def wrap(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        cached: Any = lru_cache(maxsize=results_kept)(function)  # Any: its own type asks for Hashable
        return cached

    return wrap
