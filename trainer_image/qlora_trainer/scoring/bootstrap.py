"""How sure a score is: the percentile bootstrap over prompts (Efron, 1979; Koehn, 2004, for scores of a corpus).

All who answered the same prompts are resampled together, so what a prompt does to all of them is not taken for a
difference. The samples depend on the seed and the number of prompts alone.
"""

from __future__ import annotations

import numpy as np

from qlora_trainer.scoring.metrics import Metric, Numbers
from qlora_trainer.scoring.scores import Interval

RESAMPLES = 10_000


class Resampling:
    """The same resamples of the prompts for every score of them."""

    def __init__(self, prompts: int, seed: int) -> None:
        # RandomState's streams never change between NumPy versions (NEP 19).
        drawn = np.random.RandomState(seed).randint(prompts, size=(RESAMPLES, prompts))
        rows = np.arange(RESAMPLES)[:, None] * prompts
        self._times = np.bincount((rows + drawn).ravel(), minlength=RESAMPLES * prompts).reshape(RESAMPLES, prompts)
        """[resamples, prompts]: how often each prompt is in each."""

    def score(self, metric: Metric, table: Numbers, confidence: float) -> Interval:
        """Of one who answered; the statistics are [prompts, statistics]."""
        return _interval(float(metric.score(table.sum(axis=0))), self._scores(metric, table), confidence)

    def difference(self, metric: Metric, ours: Numbers, theirs: Numbers, confidence: float) -> Interval:
        """How much better the first is than the second."""
        value = float(metric.score(ours.sum(axis=0)) - metric.score(theirs.sum(axis=0)))
        return _interval(value, self._scores(metric, ours) - self._scores(metric, theirs), confidence)

    def _scores(self, metric: Metric, table: Numbers) -> Numbers:
        """[resamples]."""
        return metric.score(self._times @ table)


def _interval(value: float, resampled: Numbers, confidence: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value=value, low=float(low), high=float(high))
