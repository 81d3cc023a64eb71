"""What stands under a name that is needed, held against what would have been created there.

Pure. Both sides are as the API server stores them: the wanted one comes out of a dry run, with the server's defaults
and with whatever its webhooks add, so equal means equal. What others write after the creation is left out: the
scheduler's choice of a node, and what the API server says of that node.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

from orchestrator.adapters.kubernetes.api import Json

METADATA_COMPARED = ("labels", "annotations", "ownerReferences", "finalizers")
WRITTEN_LATER = frozenset(
    {
        "spec.nodeName",
        "metadata.labels.topology.kubernetes.io/zone",
        "metadata.labels.topology.kubernetes.io/region",
    }
)
SHOWN_CHARACTERS = 80
HIDDEN = (".env[", ".envFrom[")
"""Values there may be secrets, and are long."""


def difference(wanted: Json, found: Json) -> str:
    """The first difference in words: `spec.containers[0].image is "b:1", not "a:1"`. Empty where there is none."""
    return next(_differences("", _compared(wanted), _compared(found)), "")


def _compared(item: Json) -> Json:
    meta: Json = item["metadata"]
    kept = {key: meta[key] for key in METADATA_COMPARED if meta.get(key)}
    return {"metadata": kept, "spec": item.get("spec", {})}


def _differences(path: str, wanted: object, found: object) -> Iterator[str]:
    if path in WRITTEN_LATER or wanted == found:
        return
    if isinstance(wanted, dict) and isinstance(found, dict):
        mine, theirs = cast(Json, wanted), cast(Json, found)
        for key in sorted(mine.keys() | theirs.keys()):
            yield from _differences(f"{path}.{key}" if path else key, mine.get(key), theirs.get(key))
    elif isinstance(wanted, list) and isinstance(found, list):
        ours, others = cast("list[object]", wanted), cast("list[object]", found)
        for index, (mine, theirs) in enumerate(zip(ours, others, strict=False)):
            yield from _differences(f"{path}[{index}]", mine, theirs)
        if len(ours) != len(others):
            yield f"{path} has {len(others)} entries, not {len(ours)}"
    elif any(part in path for part in HIDDEN):
        yield f"{path} is another"
    else:
        yield f"{path} is {_shown(found)}, not {_shown(cast(object, wanted))}"


def _shown(value: object) -> str:
    text = "unset" if value is None else json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
