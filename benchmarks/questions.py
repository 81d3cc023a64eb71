"""What benchmarks of plans ask about: a model with random weights, its job, and a GPU class."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.architectures import config
from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.model_facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A job, and the class that it is to run on."""

    model: str
    sequence_length: int
    global_batch_size: int
    class_name: str = "24Gi"

    @property
    def spec(self) -> QLoRAJobSpec:
        """The job."""
        return QLoRAJobSpec(
            model=ModelSource(source="file:///model"),
            dataset=DatasetSource(source="file:///data.jsonl"),
            adapter=AdapterSpec(rank=16),
            training=TrainingSpec(sequence_length=self.sequence_length, global_batch_size=self.global_batch_size),
        )

    @property
    def facts(self) -> ModelFacts:
        """The model."""
        return ModelFacts.from_config(config(self.model), "main")
