"""The trials of a sweep: what the hyperparameters of each are, and its job.

All of it follows from the sweep's spec and the trial's index. Draws are digests of seed, index and field, so that they
are the same wherever and whenever they are made, and those of one field do not depend on the other fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import cast

from orchestrator.api.job import ObjectMeta, OwnerReference, QLoRAJob, QLoRAJobSpec
from orchestrator.api.sweep import (
    SWEEP_LABEL,
    TRIAL_LABEL,
    DecimalRange,
    LogRange,
    QLoRASweep,
    QLoRASweepSpec,
    SweepDimension,
)

DIGITS = 6
"""Of a decimal that is drawn."""


def trial_name(sweep: QLoRASweep, index: int) -> str:
    """The name of a trial's job."""
    return f"{sweep.metadata.name}-{index}"


def parameters(spec: QLoRASweepSpec, index: int) -> dict[str, str]:
    """A trial's values, by field."""
    return {each.field: drawn(each, _share(spec.seed, index, each.field)) for each in spec.space}


def drawn(dimension: SweepDimension, share: float) -> str:
    """The value that lies so far into the dimension, from 0 to below 1."""
    if dimension.choice is not None:
        return dimension.choice[int(share * len(dimension.choice))]
    if dimension.integer is not None:
        low, high = dimension.integer.min, dimension.integer.max
        return str(low + int(share * (high - low + 1)))
    if dimension.uniform is not None:
        low, high = float(dimension.uniform.min), float(dimension.uniform.max)
        return _within(low + share * (high - low), dimension.uniform)
    assert dimension.log_uniform is not None, "the model takes one of the four"
    low, high = math.log(float(dimension.log_uniform.min)), math.log(float(dimension.log_uniform.max))
    return _within(math.exp(low + share * (high - low)), dimension.log_uniform)


def _within(value: float, bounds: DecimalRange | LogRange) -> str:
    """A decimal's text; what rounding puts outside is the bound."""
    if value <= float(bounds.min):
        return bounds.min
    if value >= float(bounds.max):
        return bounds.max
    text = f"{value:.{DIGITS}g}"
    if "e+" in text:
        text = f"{value:.0f}"
    return bounds.min if float(text) < float(bounds.min) else bounds.max if float(text) > float(bounds.max) else text


def _share(seed: int, index: int, field: str) -> float:
    digest = sha256(f"{seed}/{index}/{field}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2.0**53


def trial_job(sweep: QLoRASweep, index: int) -> QLoRAJob:
    """The job of a trial, as it is submitted. Raises ValueError for values that a job's validation refuses."""
    meta = sweep.metadata
    owner = OwnerReference(name=meta.name, uid=meta.uid)
    metadata = ObjectMeta(
        name=trial_name(sweep, index),
        namespace=meta.namespace,
        labels={SWEEP_LABEL: meta.name, TRIAL_LABEL: str(index)},
        owner_references=(owner,),
    )
    return QLoRAJob(metadata=metadata, spec=_trial_spec(sweep, parameters(sweep.spec, index)))


def _trial_spec(sweep: QLoRASweep, values: Mapping[str, str]) -> QLoRAJobSpec:
    """The job's spec with these values; trials share a registered model, and none has an alias of its own."""
    wire = sweep.spec.job.to_wire()
    for field, value in values.items():
        section, name = field.split(".")
        is_integer = next(each.is_integer for each in sweep.spec.space if each.field == field)
        _section(wire, section)[name] = int(value) if is_integer else value
    tracking = _section(wire, "tracking")
    tracking.setdefault("registeredModel", f"{sweep.metadata.namespace}-{sweep.metadata.name}")
    tracking["alias"] = None
    wire.pop("ttlSecondsAfterFinished", None)
    return QLoRAJobSpec.model_validate(wire)


def _section(wire: dict[str, object], name: str) -> dict[str, object]:
    return cast("dict[str, object]", wire.setdefault(name, {}))


def refusal(sweep: QLoRASweep) -> str | None:
    """Why no trial of a sweep should be made, in words that name the field; None where they can be.

    What the spec's own rules cannot say: whether every value of the space is one that a job takes.
    """
    spec = sweep.spec
    if spec.job.training.max_steps is not None and any(each.field == "training.epochs" for each in spec.space):
        return "spec.space: training.epochs means nothing beside spec.job.training.maxSteps; leave one of them out"
    if spec.job.adapter.start is not None and any(each.field in _TAKEN_OVER for each in spec.space):
        return (
            "spec.space: rank and alpha are taken over from spec.job.adapter.from; leave adapter.rank and "
            "adapter.alpha out of the space"
        )
    for position, dimension in enumerate(spec.space):
        for value in _extremes(dimension):
            try:
                _trial_spec(sweep, {dimension.field: value})
            except ValueError as error:
                return f"spec.space[{position}]: no job takes {value} as {dimension.field}: {_first(error)}"
    return None


_TAKEN_OVER = frozenset({"adapter.rank", "adapter.alpha"})


def _extremes(dimension: SweepDimension) -> Iterator[str]:
    """The values that stand for all: what a job refuses lies beyond a bound, or is a word."""
    yield from dimension.choice or ()
    for bounds in (dimension.uniform, dimension.log_uniform, dimension.integer):
        if bounds is not None:
            yield str(bounds.min)
            yield str(bounds.max)


def _first(error: ValueError) -> str:
    """The first complaint, in its own words."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.partition(" [type=")[0] for line in lines if "[type=" in line), lines[0])
