"""The adapter that a job asks for: a new one, or one that training goes on from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from orchestrator.api.base import DNS_LABEL_PATTERN, URI_PATTERN, DecimalString, Digest, Model, ShortText, SourceUri

MAX_TARGETS = 64
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$", min_length=1, max_length=128)]
TargetModules = Literal["all-linear"] | Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=MAX_TARGETS)]
_MODEL_NAME = r"[^/:?@\x00-\x1f\x7f]{1,256}"
REGISTERED_PREFIX, JOB_PREFIX = "models:/", "job:"
_REGISTERED = rf"^models:/{_MODEL_NAME}(/[1-9][0-9]{{0,9}}|@[A-Za-z][A-Za-z0-9_-]{{0,254}})$"
_JOB = DNS_LABEL_PATTERN.replace("^", "^job:")
ADAPTER_SOURCE_PATTERN = f"{URI_PATTERN}|{_REGISTERED}|{_JOB}"
AdapterSource = Annotated[str, StringConstraints(pattern=ADAPTER_SOURCE_PATTERN, max_length=1024)]
TAKEN_OVER = ("rank", "alpha", "target_modules", "use_rslora", "use_dora", "experts")
"""Fields of `AdapterSpec` that say what an adapter is; dropout is a way to train it."""


class StartingJob(Model):
    """The job that `adapter.from` names, as it was when it had succeeded."""

    uid: ShortText
    adapter_uri: Annotated[str, StringConstraints(max_length=2048)]
    adapter_digest: Digest
    base: SourceUri
    """Its model.source."""
    base_revision: ShortText


class AdapterSpec(Model):
    """The LoRA adapter, in PEFT's terms."""

    start: AdapterSource | None = Field(default=None, alias="from")
    """An adapter that training goes on from, instead of a new one: the URI of a folder of PEFT's, as
    `hf://owner/name` (or `hf://owner/name@revision`), `pvc://claim/path`, `s3://bucket/prefix` or `file:///path`; a
    registered version, `models:/name/3` or `models:/name@alias`; or `job:name`, another job of the namespace. Its rank,
    alpha, target modules and kind are taken over: leave these fields out, or set them to what it has."""
    rank: int = Field(default=64, ge=1, le=512)
    alpha: int = Field(default=16, ge=1, le=4096)
    dropout: DecimalString = "0.05"
    target_modules: TargetModules = "all-linear"
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Weight-decomposed adaptation (Liu et al., 2024)."""
    experts: bool = False
    """A and B for each routed expert of a mixture, too, as PEFT's `target_parameters`; has no dropout and no DoRA."""

    @model_validator(mode="after")
    def _experts_are_plain(self) -> AdapterSpec:
        if self.experts and float(self.dropout) != 0:
            raise ValueError('experts have no dropout in PEFT: set dropout to "0", or leave experts out')
        if self.experts and self.use_dora:
            raise ValueError("experts have no DoRA in PEFT: leave out useDora or experts")
        return self

    @field_validator("dropout")
    @classmethod
    def _dropout_is_a_probability(cls, value: DecimalString) -> DecimalString:
        if float(value) >= 1:
            raise ValueError("dropout must be at least 0 and below 1")
        return value

    @property
    def start_uri(self) -> str | None:
        """The address of a folder to go on from; None where something else is named, or nothing."""
        is_uri = self.start is not None and not self.start.startswith((REGISTERED_PREFIX, JOB_PREFIX))
        return self.start if is_uri else None

    @property
    def starting_job(self) -> str | None:
        """The name of the job to go on from."""
        is_job = self.start is not None and self.start.startswith(JOB_PREFIX)
        return self.start.removeprefix(JOB_PREFIX) if is_job and self.start is not None else None
