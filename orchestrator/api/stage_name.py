"""The stages of a job, and the one name that an attempt at a stage may have: `<job>-<stage>-<attempt>`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

StageKind = Literal["prepare", "train", "publish"]
STAGES_ON_GPU: frozenset[StageKind] = frozenset({"train"})
_NAME = re.compile(r"(.+)-(prepare|train|publish)-([1-9][0-9]*)")


def stage_name(job: str, stage: StageKind, attempt: int) -> str:
    """The name of one attempt at one stage of one job."""
    return f"{job}-{stage}-{attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageName:
    """One attempt at one stage of one job; `str` formats it."""

    job: str
    stage: StageKind
    attempt: int

    def __str__(self) -> str:
        return stage_name(self.job, self.stage, self.attempt)

    @classmethod
    def parse(cls, text: str) -> StageName | None:
        """The name that a text stands for; None where it is none. A job's own name may look like a stage's."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        return cls(job=match[1], stage=cast(StageKind, match[2]), attempt=int(match[3]))
