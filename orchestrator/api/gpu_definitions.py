"""GPU classes that an operator defines, as the setting has them: JSON by the class's name.

What is said here holds by itself; whether it fits to the classes that are built in is `sizing/gpu_table`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from orchestrator.api.base import Model

MAX_DEFINED_CLASSES = 16
DefinedClassName = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,3}Gi$")]
CardLabel = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]


class GpuDefinition(Model):
    """One class: which cards it takes out of the classes that their memory would put them into, and what it promises
    of them."""

    usable_mib: Annotated[int, Field(ge=2_048, le=1_048_576, alias="usableMiB")]
    """MiB that PyTorch's allocator can have on the smallest of the cards."""
    cards: Annotated[tuple[CardLabel, ...], Field(min_length=1, max_length=32)]
    """Products, as GPU Feature Discovery's label has them, and what clouds' labels call the same cards."""
    tflops: Annotated[float | None, Field(gt=0, le=100_000)] = None
    """What dense bfloat16 products sustain on the slowest of them."""
    memory_gbps: Annotated[float | None, Field(gt=0, le=1_000_000)] = None
    """Gigabytes (10^9) a second of the card's own memory."""
    host_gbps: Annotated[float | None, Field(gt=0, le=100_000)] = None
    """Gigabytes a second between host and card, in one direction."""
    multiprocessors: Annotated[int | None, Field(ge=1, le=1_024)] = None
    """The most on one of them."""
    dollars_per_hour: Annotated[float | None, Field(ge=0, le=1_000_000)] = None
    """Of one GPU, unless the prices say otherwise."""

    @model_validator(mode="after")
    def _has_all_speeds_or_none(self) -> GpuDefinition:
        speeds = {"tflops": self.tflops, "memoryGbps": self.memory_gbps, "hostGbps": self.host_gbps}
        missing = [name for name, value in speeds.items() if value is None]
        if 0 < len(missing) < len(speeds):
            raise ValueError(f"{' and '.join(missing)} must be told, too: times need all of {', '.join(speeds)}")
        return self


_BY_NAME: TypeAdapter[dict[str, GpuDefinition]] = TypeAdapter(
    Annotated[dict[DefinedClassName, GpuDefinition], Field(max_length=MAX_DEFINED_CLASSES)]
)


def read_definitions(text: str) -> Mapping[str, GpuDefinition]:
    """Definitions by name, from JSON; none in an empty text. Raises ValueError, which names field and value."""
    if not text.strip():
        return {}
    try:
        read = json.loads(text, object_pairs_hook=_each_once)
        return _BY_NAME.validate_json(json.dumps(read), strict=True)  # to which true is no number, nor is "22016"
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where or 'the whole'}: {first['msg']}, not {_shown(first['input'])}") from error
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from error


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
