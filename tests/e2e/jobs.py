"""Jobs that the end-to-end tests submit."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "medical-es"
Document = dict[str, object]


HELD_OUT_RECORDS = 20
"""Of the example's 83: evaluations take most of such a job's time."""


@cache
def held_out() -> Path:
    """A file of the first of the example's held-out records."""
    file = Path(tempfile.mkdtemp(prefix="qlora-held-out-")) / "heldout.jsonl"
    file.write_text("".join((EXAMPLE / "heldout.jsonl").read_text().splitlines(keepends=True)[:HELD_OUT_RECORDS]))
    return file


def medical_job(name: str, model: Path, *, steps: int, priority: int = 0) -> Document:
    """A short job on the example's data and a real pretrained model."""
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": model.as_uri()},
            "dataset": {"source": (EXAMPLE / "train.jsonl").as_uri(), "evalSource": held_out().as_uri()},
            "adapter": {"rank": 16, "alpha": 32},
            "training": {
                "maxSteps": steps,
                "sequenceLength": 256,
                "globalBatchSize": 2,
                "learningRate": "1e-3",
                "optimizer": "paged_adamw_8bit",
            },
            "tracking": {"experiment": name, "registeredModel": name},
            "priority": priority,
        },
    }


def tiny_job(name: str, model: Path, *, steps: int, priority: int = 0, checkpoint_steps: int = 20) -> Document:
    """A job of many quick steps on a tiny random model, with dropout and noise so that random states matter."""
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": model.as_uri()},
            "dataset": {"source": (EXAMPLE / "train.jsonl").as_uri(), "evalFraction": "0.05"},
            "adapter": {"rank": 8, "dropout": "0.1"},
            "training": {
                "maxSteps": steps,
                "sequenceLength": 256,
                "globalBatchSize": 2,
                "learningRate": "1e-3",
                "neftuneAlpha": "5",
                "optimizer": "adamw_8bit",
            },
            "evaluation": {"everySteps": max(1, steps // 4)},
            "checkpoint": {"everySeconds": 3600, "everySteps": checkpoint_steps},
            "tracking": {"experiment": name, "registeredModel": name},
            "priority": priority,
            "backoffLimit": 100,
        },
    }
