"""What MLflow's own pages read from tags: what kind of experiment it is, who made a run, and from what."""

from __future__ import annotations

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Files an experiment under model training, where runs and their charts come first."""
SCORES_PATH, ANSWERS_PATH = "answers/scores.json", "answers/answers.json"
"""Of a run's artifacts, as tables: what answers to held-out prompts are worth, and the answers."""
SAMPLES_PATH = "answers/samples.json"
"""Likewise: what was answered at evaluations."""


def run_tags(namespace: str, job: str, user: str | None = None) -> dict[str, str]:
    """The tags that a run begins with; where nobody knows the person, the namespace is who made it."""
    return {
        "mlflow.user": user or namespace,
        "mlflow.source.name": f"{namespace}/{job}",
        "mlflow.source.type": "JOB",
    }
