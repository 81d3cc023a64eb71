"""The alias of spec.tracking.promote: the tags and words that publish and the controller share.

Publish judges, and moves the alias where nobody has to approve. Where it leaves the alias alone, tags of the version
keep what the gate found, from which the controller goes on once a person asks for the alias.
"""

from __future__ import annotations

from orchestrator.api.job import PromoteSpec
from orchestrator.api.reasons import Reason
from orchestrator.api.results import Promotion
from orchestrator.api.words import on_one_line

PROMOTED_TAG = "qlora.dev/promoted"
"""With an alias: that the version has got it, and why."""
GATE_TAG = "qlora.dev/gate"
"""With an alias that the version has not got: what the gate said."""
COMPARED_TAG = "qlora.dev/compared"
"""With an alias: the version that the adapter was compared with; absent where nobody had the alias."""
MAX_TAG_CHARACTERS = 1000


def tag_value(words: str) -> str:
    """What a version's tag keeps of a sentence."""
    return on_one_line(words)[:MAX_TAG_CHARACTERS]


def moved(alias: str, version: str, words: str) -> Promotion:
    """The version has the alias, or has had it."""
    return Promotion(
        promoted=True, reason=Reason.PROMOTED, message=f"the alias {alias} moved to version {version}: {words}"
    )


def stays(alias: str, holder: str | None, reason: Reason, words: str) -> Promotion:
    """The alias is left with whoever has it."""
    return Promotion(promoted=False, reason=reason, message=f"the alias {alias} stays with {_version(holder)}: {words}")


def holder_changed(promote: PromoteSpec, holder: str | None, compared: str | None) -> Promotion | None:
    """Why the alias stays, where the gate depends on its holder and that is another now than the one compared with."""
    if not promote.depends_on_holder or holder == compared:
        return None
    words = (
        f"the adapter was compared with {_version(compared)}, from which the alias has moved since; "
        "submit the job again"
    )
    return stays(promote.alias, holder, Reason.HOLDER_CHANGED, words)


def _version(number: str | None) -> str:
    return "nobody" if number is None else f"version {number}"
