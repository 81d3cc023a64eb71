"""Layers that no table knows, traced on this machine before prepare has run, where the trainer's libraries are.

It is what prepare does, from config.json alone, and takes seconds. Where the libraries are not, or it takes too long,
figures stay a guess (`sizing/guess`), which prepare ends.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from orchestrator.api.job import QLoRAJob
from orchestrator.api.model_facts import ModelFacts
from orchestrator.errors import InvalidObject, MissingExtra, OrchestratorError
from orchestrator.sdk import extras
from orchestrator.sdk.trainer_answers import ask_trainer
from orchestrator.sizing.guess import guess_words

TIMEOUT_SECONDS = 60.0
"""A new model of 70B takes a third of it (`benchmarks.tracing`), libraries included."""

log = logging.getLogger(__name__)


def traced_here(job: QLoRAJob, facts: ModelFacts, config: Mapping[str, Any]) -> tuple[ModelFacts, str | None]:
    """The facts, with a trace where they need one and can have it, and what is said of that.

    Raises InvalidObject where it shows what prepare will refuse.
    """
    if guess_words(job.spec.adapter, facts) is None:
        return facts, None
    try:
        extras.require("trainer", purpose="tracing layers on this machine")
    except MissingExtra as error:
        log.debug("%s", error)
        return facts, None
    try:
        answered = ask_trainer(["trace"], job, timeout_seconds=TIMEOUT_SECONDS, said=json.dumps(config))
    except InvalidObject:
        raise
    except OrchestratorError as error:
        return facts, f"the layers could not be traced here: {error}"
    trace = ModelFacts.model_validate_json(answered).trace
    words = (
        f"layers of model type {facts.model_type} are in no table, and were traced here with transformers "
        f"{version('transformers')}; prepare traces them with the libraries that train"
    )
    return facts.model_copy(update={"trace": trace}), words
