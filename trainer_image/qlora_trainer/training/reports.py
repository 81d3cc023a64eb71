"""What the loop tells the agent: the latest figures, and that a checkpoint is durable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import median

from orchestrator.api.formats import Metric
from orchestrator.api.results import ProgressReport
from qlora_trainer.storage.checkpoint import StoredCheckpoint
from qlora_trainer.storage.journal import Journal, latest
from qlora_trainer.training.stop import AgentClient


class Reports:
    """Hands figures to the agent, if somebody listens."""

    def __init__(self, agent: AgentClient | None, journal: Journal, steps: int) -> None:
        self._agent = agent
        self._journal = journal
        self._steps = steps
        self._announced_step = 0

    def report(
        self,
        detail: str,
        *,
        step: int,
        step_seconds: Sequence[float],
        skips: int,
        rollbacks: int,
        checkpoint: StoredCheckpoint | None,
        warning: str | None,
    ) -> None:
        """Hand over the figures after `step`, with the time that the steps before took."""
        if self._agent is None:
            return
        self._agent.report(
            ProgressReport(
                stage="train",
                step=step,
                steps=self._steps,
                detail=detail,
                loss=latest(self._journal, Metric.TRAIN_LOSS),
                eval_loss=latest(self._journal, Metric.EVAL_LOSS),
                tokens_per_second=latest(self._journal, Metric.TOKENS_PER_SECOND),
                eta_seconds=median(step_seconds) * (self._steps - step) if step_seconds else None,
                skipped_steps=skips or None,
                rollbacks=rollbacks or None,
                checkpoint_step=checkpoint.step if checkpoint else None,
                checkpoint_uri=checkpoint.uri if checkpoint else None,
                warning=warning,
                time=datetime.now(tz=UTC),
            )
        )

    def announce(self, checkpoint: StoredCheckpoint | None) -> None:
        """Tell once of each checkpoint that it is durable."""
        if self._agent is not None and checkpoint is not None and checkpoint.step > self._announced_step:
            self._announced_step = checkpoint.step
            self._agent.announce_checkpoint(checkpoint.step, checkpoint.uri)
