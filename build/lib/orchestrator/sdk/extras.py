"""Optional extras of the distribution: what each brings, and whether it is here.

The base install has no torch, Ray, MLflow or Kubernetes client. What needs one of them asks first, so that a person
reads which extra is missing instead of a traceback, or of a service that will not start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires

from orchestrator.errors import MissingExtra

DISTRIBUTION = "qlora-orchestrator"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?[^;]*(?:;.*extra == \"(?P<extra>[\w-]+)\")?")


def require(extra: str, *, purpose: str) -> None:
    """Raise MissingExtra where libraries of the extra are not installed; `purpose` begins the sentence."""
    absent = [name for name in libraries(extra, declared()) if not is_installed(name)]
    if absent:
        raise MissingExtra(
            f"{purpose} needs the extra {extra}, of which {', '.join(absent)} {'are' if absent[1:] else 'is'} not "
            f'installed; install it: pip install "{DISTRIBUTION}[{extra}]", or in a clone: pip install ".[{extra}]"'
        )


def libraries(extra: str, requirements: Sequence[str]) -> list[str]:
    """The distributions that an extra brings, by the requirements' metadata; extras of our own are followed."""
    return sorted(set(_followed(extra, requirements)))


def _followed(extra: str, requirements: Sequence[str]) -> Iterator[str]:
    for text in requirements:
        found = REQUIREMENT.match(text)
        assert found is not None, f"the metadata has a requirement that is none: {text!r}"
        if found["extra"] != extra:
            continue
        if found["name"] != DISTRIBUTION:
            yield found["name"]
            continue
        for inner in found["extras"].split(","):
            yield from _followed(inner, requirements)


def declared() -> Sequence[str]:
    """The requirements of the installed distribution; none where this is a tree that nobody installed."""
    try:
        return requires(DISTRIBUTION) or ()
    except PackageNotFoundError:
        return ()


def is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
