"""Regular expressions that people write and that run on what models write: in time linear in the text.

The engine is Rust's `regex`, which pydantic validates patterns with. It has no look-around and no back-references, and
so nothing that backtracks; the API server's RE2 refuses the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError


def compile_regex(pattern: str) -> Callable[[str], bool]:
    """Whether a text holds what the pattern describes, anywhere; ValueError for a pattern that is none."""
    try:
        adapter = TypeAdapter[str](Annotated[str, StringConstraints(pattern=pattern)])
    except SchemaError as error:
        raise ValueError(" ".join(str(error).split())) from error

    def found(text: str) -> bool:
        try:
            adapter.validate_python(text)
        except ValidationError:
            return False
        return True

    return found
