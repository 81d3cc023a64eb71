"""The base of every contract model, and the scalar types they share.

Wire names are camelCase as Kubernetes users expect; unknown fields are errors; objects are frozen. Decimals
travel as patterned strings, because a float does not survive every JSON and YAML parser unchanged and
Kubernetes API conventions advise against it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic.alias_generators import to_camel

API_VERSION: Literal["qlora.dev/v1alpha1"] = "qlora.dev/v1alpha1"

DECIMAL_PATTERN = r"^(0|[1-9][0-9]{0,9})(\.[0-9]{1,12})?([eE]-?[0-9]{1,2})?$"
DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
URI_PATTERN = r"^(hf|pvc|s3|file)://[^\s]+$"
STORE_URI_PATTERN = r"^(pvc|s3|file)://[^\s]+$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"

DecimalString = Annotated[str, StringConstraints(pattern=DECIMAL_PATTERN, max_length=24, strict=True)]
DnsLabel = Annotated[str, StringConstraints(pattern=DNS_LABEL_PATTERN, min_length=1, max_length=63)]
# A job's name is a label value and the stem of its pods' names: `<job>-publish-999` must stay a DNS label.
JobName = Annotated[str, StringConstraints(pattern=DNS_LABEL_PATTERN, min_length=1, max_length=48)]
SourceUri = Annotated[str, StringConstraints(pattern=URI_PATTERN, max_length=1024)]
StoreUri = Annotated[str, StringConstraints(pattern=STORE_URI_PATTERN, max_length=1024)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN, max_length=71)]
ShortText = Annotated[str, StringConstraints(max_length=256)]
Sentence = Annotated[str, StringConstraints(max_length=2048)]


class Model(BaseModel):
    """A frozen contract model: camelCase on the wire, snake_case in Python, nothing unknown."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    def to_wire(self) -> dict[str, object]:
        """The object as JSON types with wire names, without unset optionals."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def decimal(value: DecimalString) -> Decimal:
    """The exact number that a patterned decimal string names."""
    return Decimal(value)


def utc(timestamp_seconds: float) -> datetime:
    """An aware UTC datetime from seconds since the epoch."""
    return datetime.fromtimestamp(timestamp_seconds, tz=UTC)
