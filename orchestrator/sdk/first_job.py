"""A first manifest for a data file: its format is found in the first record, the rest are sensible values, commented.

Nothing is fetched, and no more of the file is read than its first record.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import IO, cast

from orchestrator.api.base import API_VERSION
from orchestrator.api.record_fields import OPENAI_PREFERENCE_FIELDS, REQUIRED_FIELDS
from orchestrator.api.uris import file_uri
from orchestrator.errors import InvalidObject
from orchestrator.sdk import extras
from orchestrator.sdk.problems import closest, cut

MAX_RECORD_CHARACTERS = 64 << 20
MAX_NAME_CHARACTERS = 40
DEFAULT_MODEL = "hf://Qwen/Qwen2.5-7B-Instruct"
MANIFEST = """\
# Written by `qlora init`. All fields, with their defaults and bounds: docs/reference/qlorajob.md
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata:
  name: {name}
spec:
  model:
    source: {model}
  dataset:
    source: {source}
    format: {format}
    evalFraction: "0.1"      # held out, to tell learning from memorising; or evalSource, a file of its own
  adapter:
    rank: 16
    alpha: 16
  training:
{training}"""
TRAINING = """\
    epochs: "3"
    sequenceLength: 2048     # tokens; a longer record is refused, unless dataset.tooLong says truncate or drop
    learningRate: "2e-4"
"""
TRAINING_ON_PREFERENCES = """\
    objective:
      type: dpo
      beta: "0.1"            # how much it costs to move away from the base
    epochs: "1"
    sequenceLength: 2048     # tokens of both answers, each with its prompt; longer ones are refused or dropped
    learningRate: "5e-6"     # of TRL's example of DPO with LoRA
"""


def manifest(data: Path, model: str, folder: Path) -> str:
    """The text of a manifest that is to lie in `folder`; raises InvalidObject for a file that no format fits."""
    form = format_of(data)
    return MANIFEST.format(
        name=job_name(data),
        model=model_source(model),
        source=file_source(data, folder),
        format=form,
        training=TRAINING_ON_PREFERENCES if form == "preference" else TRAINING,
    )


def document(data: str, model: str, *, name: str | None, spec: Mapping[str, object]) -> dict[str, object]:
    """A job for a data file or URI in its wire form, with these fields of the spec beside them.

    A section that is given as a mapping goes on top of what is found; a file's format is that of its first record.
    """
    dataset: dict[str, object] = {"source": data}
    if "://" not in data:
        dataset = {"source": file_uri(Path(data).resolve()), "format": format_of(Path(data)), "evalFraction": "0.1"}
    found: dict[str, object] = {"model": {"source": model_source(model)}, "dataset": dataset}
    if dataset.get("format") == "preference":
        found["training"] = PREFERENCE_TRAINING
    for section, value in spec.items():
        known = found.get(section)
        merged = isinstance(value, Mapping) and isinstance(known, Mapping)
        found[section] = {**cast("dict[str, object]", known), **cast("dict[str, object]", value)} if merged else value
    metadata = {"generateName": f"{job_name(Path(model))}-"} if name is None else {"name": name}
    return {"apiVersion": API_VERSION, "kind": "QLoRAJob", "metadata": metadata, "spec": found}


PREFERENCE_TRAINING = {"objective": {"type": "dpo"}, "learningRate": "5e-6"}
"""The learning rate of TRL's example of DPO with LoRA (trl/scripts/dpo.py)."""


def file_source(data: Path, folder: Path) -> str:
    """The URI of a file in a manifest that is to lie in `folder`."""
    relative = os.path.relpath(data.resolve(), folder.resolve())
    return file_uri(relative if relative.startswith("../") else f"./{relative}")


def model_source(model: str) -> str:
    """The URI of a model: what is one already, a folder here, or else a name on the hub."""
    if "://" in model:
        return model
    return file_uri(Path(model).resolve()) if Path(model).is_dir() else f"hf://{model}"


def job_name(data: Path) -> str:
    """A job's name from a file's: `My Notes.jsonl.gz` as `my-notes`."""
    return name_of(data.name.partition(".")[0])


def name_of(text: str) -> str:
    """A job's name from what somebody called something."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:MAX_NAME_CHARACTERS].strip("-") or "job"


def format_of(data: Path) -> str:
    """The format whose fields the first record has."""
    found = first_fields(data)
    # Preferences may have `messages` as well.
    if REQUIRED_FIELDS["preference"] <= found or set(OPENAI_PREFERENCE_FIELDS) <= found:
        return "preference"
    for name, wanted in REQUIRED_FIELDS.items():
        if wanted <= found:
            return name
    near = {
        field: closest(field, {each for wanted in REQUIRED_FIELDS.values() for each in wanted})
        for field in sorted(found)
    }
    advice = "; ".join(f"did you mean {good} by {bad}?" for bad, good in near.items() if good is not None)
    known = ", ".join(f"{name} ({' and '.join(sorted(wanted))})" for name, wanted in REQUIRED_FIELDS.items())
    has = ", ".join(cut(field) for field in sorted(found)) or "none"
    raise InvalidObject(
        f"{data}: the fields of its first record are those of no format: {has}; " + (advice or f"known are {known}")
    )


def first_fields(data: Path) -> Set[str]:
    """The names of the fields of a file's first record."""
    suffix = Path(data.name.removesuffix(".gz")).suffix
    try:
        if suffix == ".parquet":
            return _columns(data)
        with _opened(data) as stream:
            if suffix == ".csv":
                return {name for name in next(csv.reader(stream), ()) if name}
            return _first_object(data, stream, array=suffix == ".json")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InvalidObject(f"{data}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _opened(data: Path) -> IO[str]:
    if data.suffix == ".gz":
        return gzip.open(data, "rt", encoding="utf-8-sig")
    return data.open(encoding="utf-8-sig")


def _columns(data: Path) -> Set[str]:
    extras.require("trainer", purpose="reading Parquet")
    import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]  it has none

    return set(cast("list[str]", pyarrow.parquet.read_schema(data).names))  # pyright: ignore[reportUnknownMemberType]


def _first_object(data: Path, stream: IO[str], *, array: bool) -> Set[str]:
    if array:
        text = stream.read(MAX_RECORD_CHARACTERS).lstrip().removeprefix("[").lstrip()
    else:
        text = next((line for line in stream if line.strip()), "")[:MAX_RECORD_CHARACTERS]
    try:
        record: object = json.JSONDecoder().raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError) as error:
        raise InvalidObject(
            f"{data}: its first record is no JSON: {cut(text.strip()) or 'nothing is there'}"
        ) from error
    if not isinstance(record, dict):
        raise InvalidObject(f"{data}: its first record is no object with fields: {cut(text.strip())}")
    return set(cast("dict[str, object]", record))
