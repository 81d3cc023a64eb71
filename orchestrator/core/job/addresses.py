"""Which URIs a job may name where others have jobs, too.

A job on a cluster names no file of a machine, no claim that is the service's own and no folder of another namespace in
a store of jobs; its own store is the default, or one that an operator allows. Compared are the parts that readers make
of a URI, not its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from orchestrator.api.job import QLoRAJob, QLoRAJobSpec

STORE_FIELD = "spec.store.uri"
_CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressRules:
    """What an operator says about URIs."""

    restricted: bool = False
    """Whether the rules hold at all: on one's own machine everything is one's own."""
    stores: tuple[str, ...] = ()
    """Stores that jobs may name besides the default."""
    reserved_claims: frozenset[str] = frozenset()
    """Claims that no job may name."""


def refused_address(job: QLoRAJob, default_store: str, rules: AddressRules) -> str | None:
    """Why a job may not have what it names, and what to write instead; None where it may."""
    if not rules.restricted:
        return None
    refusal = refused_file(job.spec)
    if refusal is not None:
        return refusal
    stores = (default_store, *rules.stores)
    for field, uri in _named(job.spec):
        why = _refused(field, uri, job.metadata.namespace, stores, rules)
        if why is not None:
            return f"{field}: {uri} {why}"
    return None


def refused_file(spec: QLoRAJobSpec) -> str | None:
    """Why a spec can be nobody's but this machine's: it names a file; None where it names none."""
    for field, uri in _named(spec):
        if uri.startswith("file://"):
            return (
                f"{field}: {uri} is a file of one machine, and a job of a cluster may run on any: put it on a claim "
                "(pvc://), into a bucket (s3://) or on the hub (hf://)"
            )
    return None


def _named(spec: QLoRAJobSpec) -> Iterator[tuple[str, str]]:
    """The URIs of a spec, by their fields."""
    yield "spec.model.source", spec.model.source
    yield "spec.dataset.source", spec.dataset.source
    if spec.dataset.eval_source is not None:
        yield "spec.dataset.evalSource", spec.dataset.eval_source
    if spec.adapter.start_uri is not None:
        yield "spec.adapter.from", spec.adapter.start_uri
    if spec.store is not None:
        yield STORE_FIELD, spec.store.uri


def _refused(field: str, uri: str, namespace: str, stores: tuple[str, ...], rules: AddressRules) -> str | None:
    parts = _parts(uri)
    if "::" in uri or ".." in parts:
        return "must be a plain address: remove `..` and `::` from it"
    scheme, place = parts[:2]
    if scheme == "pvc" and not _CLAIM.fullmatch(place):
        return "names no claim: write pvc://claim/path"
    if scheme == "pvc" and place in rules.reserved_claims:
        return "lies on a claim of the service's own; name another"
    if field == STORE_FIELD:
        return None if parts in map(_parts, stores) else _other_store(stores)
    for store in map(_parts, stores):
        inside = parts[len(store) :]
        if parts[: len(store)] == store and inside and inside[0] != namespace:
            return f"lies in the store of another namespace's jobs; those of {namespace} lie below {namespace}/"
    return None


def _other_store(stores: tuple[str, ...]) -> str:
    return (
        f"is no store that jobs may name here, which are {', '.join(stores)}; leave it out for the first, or let an "
        "operator allow it (store.allowed of the chart)"
    )


def _parts(uri: str) -> tuple[str, ...]:
    """Scheme, claim or bucket, and the names below it, as whoever reads them takes them apart."""
    scheme, _, rest = uri.partition("://")
    if scheme == "pvc":
        place, _, path = rest.partition("/")
        rest = f"{place}/{unquote(path)}"
    place, *names = rest.split("/")
    return (scheme, place, *(name for name in names if name not in ("", ".")))
