"""Metrics of answers against what SQuAD's script and sacrebleu say, and intervals against theory."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qlora_trainer.scoring.bootstrap import RESAMPLES, Resampling
from qlora_trainer.scoring.metrics import exact_match, is_json, metric, token_f1

from orchestrator.api.job import AnswerMetric
from orchestrator.api.linear_regex import compile_regex

CORPORA: list[dict[str, Any]] = json.loads((Path(__file__).parent / "sacrebleu_scores.json").read_text())["corpora"]


def score(name: AnswerMetric, answers: list[str], references: list[str], regex: str | None = None) -> float:
    found = metric(name, regex)
    return float(found.score(found.table(answers, references).sum(axis=0)))


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda corpus: corpus["references"][0][:20])
@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_scores_of_a_corpus_are_those_of_sacrebleu(name: AnswerMetric, corpus: dict[str, Any]) -> None:
    assert score(name, corpus["answers"], corpus["references"]) == pytest.approx(corpus[name], abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        # What SQuAD's evaluate-v1.1.py says of each.
        ("The Denver Broncos!", "denver broncos", True, 1.0),
        ("Denver", "Denver Broncos", False, 2 / 3),
        ("the the the", "a", True, 1.0),  # nothing is left of either
        ("", "Paris", False, 0.0),
        ("Paris.", "", False, 0.0),
        ("to be or not to be", "to be", False, 0.5),
        ("U.S.A.", "USA", True, 1.0),
        ("theatre", "atre", False, 0.0),  # an article is a word
        ("10-20", "1020", True, 1.0),
        ("l’été", "l'été", False, 0.0),  # only ASCII's punctuation goes
    ],
)
def test_answers_are_compared_as_squad_does(answer: str, reference: str, exact: bool, f1: float) -> None:
    assert exact_match(answer, reference) is exact
    assert token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, 2.5e3, null, "\\u00e9"]}', True),
        (" 42\n", True),
        ("1" * 10_000, True),
        ("", False),
        ("{'a': 1}", False),
        ('{"a": 1,}', False),
        ('{"a": 1} and more', False),
        ('```json\n{"a": 1}\n```', False),
        ("NaN", False),
        ('{"a": -Infinity}', False),
        ("01", False),
        ('"\t"', False),
        ("\u00a0{}", False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_what_its_rfc_says(text: str, valid: bool) -> None:
    assert is_json(text) is valid


def test_a_pattern_is_looked_for_anywhere_unless_it_is_anchored() -> None:
    answers = ["yes", "oh yes", "no"]
    assert score("regex", answers, [""] * 3, "yes") == pytest.approx(2 / 3)
    assert score("regex", answers, [""] * 3, "^yes$") == pytest.approx(1 / 3)


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"(a)\1", "[z-a]", "(a{1000}){1000}{1000}"])
def test_what_is_no_linear_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="regex"):
        compile_regex(pattern)


@pytest.mark.timeout(20)
def test_no_pattern_takes_for_ever() -> None:
    assert not compile_regex(r"^(([a-z])+.)+[A-Z]([a-z])+$")("a" * 100_000)


def test_an_interval_of_a_share_is_about_the_binomial_one() -> None:
    exact = metric("exactMatch")
    table = exact.table(["x"] * 60 + ["y"] * 40, ["x"] * 100)
    found = Resampling(100, seed=3).score(exact, table, confidence=0.95)
    assert found.value == pytest.approx(0.6)
    assert found.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.015)
    assert found.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.015)


def test_answers_to_the_same_prompts_are_resampled_together() -> None:
    # Both are right and wrong on the same prompts, but for five that only the first can do.
    exact = metric("exactMatch")
    ours = exact.table(["x"] * 55 + ["y"] * 45, ["x"] * 100)
    theirs = exact.table(["x"] * 50 + ["y"] * 50, ["x"] * 100)
    resampling = Resampling(100, seed=0)
    paired = resampling.difference(exact, ours, theirs, confidence=0.95)
    assert (paired.value, paired.low > 0, paired.high < 0.11) == (pytest.approx(0.05), True, True)
    apart = Resampling(100, seed=0).difference(exact, ours, np.flip(theirs, axis=0), confidence=0.95)
    assert apart.value == pytest.approx(0.05)
    assert apart.low < 0, "what prompts do to both is no longer shared"


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_score_of_a_resample_is_the_score_of_that_corpus(name: AnswerMetric) -> None:
    corpus = max(CORPORA, key=lambda each: len(each["answers"]))
    found = metric(name)
    answers, references = corpus["answers"], corpus["references"]
    table = found.table(answers, references)
    drawn = np.random.RandomState(1).randint(len(answers), size=len(answers))
    again = score(name, [answers[i] for i in drawn], [references[i] for i in drawn])
    times = np.bincount(drawn, minlength=len(answers))
    assert float(found.score(times @ table)) == pytest.approx(again)


def test_the_same_seed_gives_the_same_interval_for_ever() -> None:
    exact = metric("exactMatch")
    table = exact.table(["x", "x", "y", "x", "y", "x", "x"], ["x"] * 7)
    first, again = (Resampling(7, seed=11).score(exact, table, 0.9) for _ in range(2))
    assert first == again
    assert (first.low, first.high) == (pytest.approx(3 / 7), pytest.approx(1.0))


def test_one_prompt_and_a_useless_answer_have_intervals_too() -> None:
    for name, answers in product(("exactMatch", "f1", "bleu", "chrf"), ([""], ["x"])):
        found = metric(name)
        interval = Resampling(1, seed=0).score(found, found.table(answers, ["wanted"]), 0.95)
        assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert RESAMPLES >= 10_000
