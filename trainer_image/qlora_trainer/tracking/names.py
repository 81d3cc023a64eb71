"""Whether the job may write under its names in MLflow, asked before a GPU is taken."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from orchestrator.api.reasons import ExitCode
from orchestrator.api.task import TRACKING_URI_VARIABLE, StageTask
from qlora_trainer.outcome import Transient
from qlora_trainer.storage.backoff import Backoff
from qlora_trainer.tracking.mlflow_client import insist
from qlora_trainer.tracking.mlflow_run import refuse_foreign_experiment
from qlora_trainer.tracking.registry import refuse_foreign_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
ONCE = Backoff(tries=1, first_pause_seconds=1.0)


def refuse_foreign_names(task: StageTask) -> None:
    """Raise UserError for an experiment or a registered model of somebody else's. MLflow away is asked again later."""
    if not os.environ.get(TRACKING_URI_VARIABLE):
        return

    def look(client: MlflowClient) -> None:
        refuse_foreign_experiment(client, task)
        refuse_foreign_model(client, task)

    try:
        insist("look at the job's names", look, ONCE)
    except Transient as error:
        if error.exit_code is ExitCode.CREDENTIALS_REFUSED:
            raise  # publish would wait for the same, and by then a GPU has trained
        log.warning("%s; publish looks whose they are", error)
