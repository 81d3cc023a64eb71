"""The base of every contract model, and the scalar types they share.

Wire names are camelCase as Kubernetes users expect; unknown fields are errors; objects are frozen. Decimals
travel as patterned strings, because a float does not survive every JSON and YAML parser unchanged and
Kubernetes API conventions advise against it; a number that is given for one becomes its text here. Every number has a
bound that a JSON reader, an int64 and a float keep exactly, and no number is infinite or no number at all: what passes
here can be stored, sent and read again.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationInfo,
)
from pydantic.alias_generators import to_camel

from orchestrator.api.words import BLANKS, CONTROL, DIRECTION, LINES, UNSEEN, on_one_line

API_VERSION: Literal["qlora.dev/v1alpha1"] = "qlora.dev/v1alpha1"

DECIMAL_PATTERN = r"^(0|[1-9][0-9]{0,9})(\.[0-9]{1,12})?([eE]-?[0-9]{1,2})?$"
SIGNED_DECIMAL_PATTERN = DECIMAL_PATTERN.replace("^", "^-?", 1)
DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_URI_REST = r'([!"$-.0->@-Z\\^-~]+([/?#][^\s]*)?|[/?#][^\s]*)'
"""An authority of visible ASCII without brackets, which mean an IPv6 address, then anything: it can be split."""
URI_PATTERN = f"^(hf|pvc|s3|file)://{_URI_REST}$"
STORE_URI_PATTERN = f"^(pvc|s3|file)://{_URI_REST}$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"


def _in_patterns(characters: str) -> str:
    """A character class as the regular expressions of pydantic and of the API server (Rust's and RE2) both read it."""
    return "".join(c if c.isascii() else f"\\x{{{ord(c):04x}}}" for c in characters)


_NOT_IN_NAMES = CONTROL + _in_patterns(DIRECTION + LINES + UNSEEN)
_NOT_AT_ENDS = " " + _in_patterns(BLANKS)


_END = f"[^{_NOT_AT_ENDS}{_NOT_IN_NAMES}]"
NAME_PATTERN = f"^{_END}([^{_NOT_IN_NAMES}]*{_END})?$"
"""A name that people see: no blanks at its ends, and nothing in it that is harmful or not seen."""


BY_PEOPLE = "by people"
"""The context in which JSON is validated that people wrote, and no server or client sent."""


def written(value: object, info: ValidationInfo) -> object:
    """A number as the text that is sent for it: people write `epochs: 3`, in YAML and in Python."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and (info.mode == "python" or info.context == BY_PEOPLE) else value


DecimalString = Annotated[
    str, StringConstraints(pattern=DECIMAL_PATTERN, max_length=24, strict=True), BeforeValidator(written)
]
SignedDecimalString = Annotated[
    str, StringConstraints(pattern=SIGNED_DECIMAL_PATTERN, max_length=24, strict=True), BeforeValidator(written)
]
DnsLabel = Annotated[str, StringConstraints(pattern=DNS_LABEL_PATTERN, min_length=1, max_length=63)]
# A job's name is a label value and the stem of its pods' names: `<job>-publish-999` must stay a DNS label.
JobName = Annotated[str, StringConstraints(pattern=DNS_LABEL_PATTERN, min_length=1, max_length=48)]
SourceUri = Annotated[str, StringConstraints(pattern=URI_PATTERN, max_length=1024)]
StoreUri = Annotated[str, StringConstraints(pattern=STORE_URI_PATTERN, max_length=1024)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN, max_length=71)]
MAX_SHORT_CHARACTERS, MAX_SENTENCE_CHARACTERS = 256, 2048


def _short(text: str) -> str:
    return on_one_line(text)[:MAX_SHORT_CHARACTERS]


def _sentence(text: str) -> str:
    return on_one_line(text)[:MAX_SENTENCE_CHARACTERS]


ShortText = Annotated[str, StringConstraints(max_length=MAX_SHORT_CHARACTERS), AfterValidator(_short)]
Sentence = Annotated[
    str,
    StringConstraints(max_length=MAX_SENTENCE_CHARACTERS),
    AfterValidator(_sentence),
]
"""Words of whoever wrote them, fit to be shown."""

MAX_COUNT = 2**53 - 1  # above it a JSON reader that knows floats alone is no longer exact
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""Of anything, bytes included."""
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
ExitStatus = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
"""Of seconds or money."""
Time = AwareDatetime
"""With a zone: times of several writers are compared."""


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[FiniteFloat | None, BeforeValidator(_finite_or_none)]
"""A figure that a stage reports; absent where it is none, as of a loss that diverged: JSON has no word for it."""


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
