"""Scores of a job's answers: of the adapter, the base and the alias's holder, and of the differences between them."""

from __future__ import annotations

from orchestrator.api.formats import AnswerTable
from orchestrator.api.job import AnswerMetric, GenerationSpec
from qlora_trainer.scoring.bootstrap import Resampling
from qlora_trainer.scoring.metrics import Metric, Numbers, metric
from qlora_trainer.scoring.scores import CONFIDENCE, Score


class Comparison:
    """What answers are worth, at any confidence; the same answers and seed always give the same."""

    def __init__(self, table: AnswerTable, spec: GenerationSpec, seed: int) -> None:
        """`table` has at least one prompt."""
        self._resampling = Resampling(len(table.prompts), seed)
        self._metrics: dict[AnswerMetric, Metric] = {name: metric(name, spec.regex) for name in spec.metrics}
        references = [each.reference for each in table.prompts]
        of_holder = [each.holder.text for each in table.prompts if each.holder is not None]
        texts = {
            "adapter": [each.adapter.text for each in table.prompts],
            "base": [each.base.text for each in table.prompts],
        }
        if len(of_holder) == len(references):
            texts["holder"] = of_holder
        self._tables: dict[tuple[AnswerMetric, str], Numbers] = {
            (name, who): found.table(answers, references)
            for name, found in self._metrics.items()
            for who, answers in texts.items()
        }

    def scores(self, confidence: float = CONFIDENCE) -> dict[AnswerMetric, Score]:
        """Every metric, in the order of the spec."""
        return {name: self.score(name, confidence) for name in self._metrics}

    def score(self, name: AnswerMetric, confidence: float) -> Score:
        """One metric."""
        found, resampling = self._metrics[name], self._resampling
        adapter, base = self._tables[name, "adapter"], self._tables[name, "base"]
        holder = self._tables.get((name, "holder"))
        return Score(
            adapter=resampling.score(found, adapter, confidence),
            base=resampling.score(found, base, confidence),
            holder=None if holder is None else resampling.score(found, holder, confidence),
            over_base=resampling.difference(found, adapter, base, confidence),
            over_holder=None if holder is None else resampling.difference(found, adapter, holder, confidence),
        )
