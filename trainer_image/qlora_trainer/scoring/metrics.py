"""Metrics of generated answers against references. Rules:

- A metric is a sum over answers of a few numbers each, and a score made of the sums. So a score of any sample of the
  answers is had from the same numbers, which is what a bootstrap needs.
- Exact match and F1 are SQuAD's (Rajpurkar et al., 2016, evaluate-v1.1.py), chrF (Popović, 2015) and BLEU (Papineni et
  al., 2002) sacrebleu's with its defaults: `nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no` and
  `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`. Both of these go to 100, the others to 1.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from orchestrator.api.job import AnswerMetric
from orchestrator.api.linear_regex import compile_regex

Numbers = NDArray[np.float64]

CHRF_ORDER = 6
CHRF_BETA = 2
BLEU_ORDER = 4
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)
TOKENS_13A = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
"""mteval-v13a.pl's rules, as sacrebleu has them."""
ENTITIES_13A = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What is summed over answers, and what the sums come to."""

    statistics: Callable[[str, str], Sequence[float]]
    """Of an answer and its reference."""
    score: Callable[[Numbers], Numbers]
    """Of sums [..., statistics]: [...]."""

    def table(self, answers: Sequence[str], references: Sequence[str]) -> Numbers:
        """The statistics of all answers, [answers, statistics]."""
        pairs = zip(answers, references, strict=True)
        return np.array([self.statistics(answer, reference) for answer, reference in pairs], dtype=np.float64)


def metric(name: AnswerMetric, regex: str | None = None) -> Metric:
    """The metric of this name; `regex` is the pattern of the one that is called so."""
    match name:
        case "exactMatch":
            return _share(exact_match)
        case "f1":
            return _share(token_f1)
        case "jsonValidity":
            return _share(lambda answer, _: is_json(answer))
        case "regex":
            assert regex is not None, "the spec names a pattern"
            found = compile_regex(regex)
            return _share(lambda answer, _: found(answer))
        case "chrf":
            return Metric(statistics=_chrf_statistics, score=_chrf)
        case "bleu":
            return Metric(statistics=_bleu_statistics, score=_bleu)


def _share(of_one: Callable[[str, str], float]) -> Metric:
    """The mean of a figure that each answer has."""
    return Metric(
        statistics=lambda answer, reference: (float(of_one(answer, reference)), 1.0),
        score=lambda sums: sums[..., 0] / sums[..., 1],
    )


# --- SQuAD


def normalized(text: str) -> str:
    """As SQuAD compares: lower case, without punctuation and articles, words one blank apart."""
    bare = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same once normalized."""
    return normalized(answer) == normalized(reference)


def token_f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of normalized words; where one has none, whether neither has."""
    ours, theirs = normalized(answer).split(), normalized(reference).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))


# --- form


def is_json(text: str) -> bool:
    """Whether the whole text is one JSON value as RFC 8259 has it: NaN and Infinity are none."""
    try:
        # Numbers stay texts: one of thousands of digits is valid.
        json.loads(text, parse_constant=_refuse, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# --- chrF


def _chrf_statistics(answer: str, reference: str) -> Sequence[float]:
    """For each order the n-grams of answer, reference and both."""
    found: list[float] = []
    ours, theirs = ("".join(text.split()) for text in (answer, reference))
    for order in range(1, CHRF_ORDER + 1):
        own, wanted = _ngrams(ours, order), _ngrams(theirs, order)
        # An order that the reference has nothing of is not held against the answer.
        found += [own.total() if wanted else 0, wanted.total(), (own & wanted).total()]
    return found


def _chrf(sums: Numbers) -> Numbers:
    ours, wanted, both = (sums[..., part::3] for part in range(3))
    counts = (ours > 0) & (wanted > 0)
    orders = np.maximum(counts.sum(axis=-1), 1)
    precision = (_ratio(both, ours) * counts).sum(axis=-1) / orders
    recall = (_ratio(both, wanted) * counts).sum(axis=-1) / orders
    return 100 * _ratio((1 + CHRF_BETA**2) * precision * recall, CHRF_BETA**2 * precision + recall)


# --- BLEU


def _bleu_statistics(answer: str, reference: str) -> Sequence[float]:
    """The lengths of answer and reference, then for each order the n-grams of both and of the answer."""
    ours, theirs = tokens_13a(answer), tokens_13a(reference)
    found: list[float] = [len(ours), len(theirs)]
    for order in range(1, BLEU_ORDER + 1):
        own, wanted = _ngrams(ours, order), _ngrams(theirs, order)
        found += [(own & wanted).total(), own.total()]
    return found


def _bleu(sums: Numbers) -> Numbers:
    ours, wanted, both, own = sums[..., 0], sums[..., 1], sums[..., 2::2], sums[..., 3::2]
    # Each order that nothing is found of counts half of what the one before it did (Chen and Cherry, 2014, method 3).
    halvings = 2.0 ** np.cumsum((both == 0) & (own > 0), axis=-1)
    precision = np.where(both > 0, _ratio(both, own), _ratio(np.ones_like(own), halvings * own))
    is_nothing = (own == 0).any(axis=-1) | (both == 0).all(axis=-1)
    logarithms = np.log(np.where(precision > 0, precision, 1.0)).mean(axis=-1)
    brevity = np.exp(np.minimum(0.0, 1 - _ratio(wanted, np.maximum(ours, 1))))
    return np.where(is_nothing, 0.0, 100 * brevity * np.exp(logarithms))


def tokens_13a(text: str) -> list[str]:
    """The words and signs of a text as mteval-v13a.pl cuts it."""
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES_13A:
        line = line.replace(entity, character)
    line = f" {line} "
    for pattern, replacement in TOKENS_13A:
        line = pattern.sub(replacement, line)
    return line.split()


def _ngrams(parts: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(parts[start : start + order]) for start in range(len(parts) - order + 1))


def _ratio(part: Numbers, whole: Numbers) -> Numbers:
    """0 where there is no whole."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
