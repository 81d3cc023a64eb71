"""The example dataset `examples/medical-es` keeps the promises of its README.

The files are data that no code generates, so this reads them with the standard library alone, line by line.
Held-out loss is evidence that training generalizes: no held-out term may occur anywhere in the training
file.
"""

import itertools
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest

DATASET = Path(__file__).parents[2] / "examples" / "medical-es"
SPLITS = ("train", "heldout")
MINIMUM_ITEMS = {"train": 440, "heldout": 70}
ANSWER_WORDS = range(12, 46)
QUESTION_FORMS = (
    re.compile(r"¿Qué es (?:el|la) (?P<term>[^?]+)\?"),
    re.compile(r"¿Qué son (?:los|las) (?P<term>[^?]+)\?"),
    re.compile(r"Define «(?P<term>[^»]+)»\."),
    re.compile(r"¿Qué significa (?:el sufijo|el prefijo|la raíz) «(?P<term>[^»]+)»\?"),
    re.compile(r"¿Qué significa la sigla (?P<term>[A-Z]+)\?"),
)


class Item(NamedTuple):
    where: str
    question: str
    answer: str

    @property
    def term(self) -> str:
        """What the question asks about, without its article; the question has one of the five forms."""
        matches = [match for form in QUESTION_FORMS if (match := form.fullmatch(self.question))]
        assert len(matches) == 1, f"{self.where}: not one of the question forms: {self.question}"
        return matches[0]["term"]

    @property
    def definition(self) -> str:
        """The first sentence of the answer, from its verb on."""
        return re.split(r"\b(?:es|son|significa)\b", self.answer.split(". ")[0], maxsplit=1)[1].strip()


def read_split(split: str) -> list[Item]:
    path = DATASET / f"{split}.jsonl"
    lines = path.read_bytes().decode("utf-8").splitlines()
    return [parse_line(line, where=f"{path.name}:{number}") for number, line in enumerate(lines, start=1)]


def parse_line(line: str, where: str) -> Item:
    record = json.loads(line)
    assert list(record) == ["messages"], where
    assert [list(message) for message in record["messages"]] == [["role", "content"]] * 2, where
    user, assistant = record["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant"), where
    return Item(where, user["content"], assistant["content"])


def mentions(text: str, term: str) -> bool:
    """Whether `term` stands in `text` as a word of its own; an acronym only in its own capitals."""
    flags = re.NOFLAG if term.isupper() else re.IGNORECASE
    return re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text, flags) is not None


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_is_one_question_and_its_answer_and_there_are_enough(split: str) -> None:
    assert len(read_split(split)) >= MINIMUM_ITEMS[split]


@pytest.mark.parametrize("split", SPLITS)
def test_text_is_utf8_in_composed_form_and_ends_with_a_newline(split: str) -> None:
    text = (DATASET / f"{split}.jsonl").read_bytes().decode("utf-8")
    assert unicodedata.is_normalized("NFC", text)
    assert text.endswith("}\n")
    assert not [sign for sign in ("\ufeff", "\r", "\\u") if sign in text]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_two_short_sentences_that_begin_with_the_term(split: str) -> None:
    for item in read_split(split):
        assert len(item.answer.split()) in ANSWER_WORDS, item
        assert re.match(r"(?:El|La|Los|Las) ", item.answer), item
        assert mentions(item.answer[: item.answer.index(item.definition)], item.term), item
        assert item.answer.endswith("."), item
        assert item.answer.count(". ") == 1, item
        assert re.search(r"\. [A-ZÁÉÍÓÚ]", item.answer), item
        assert item.answer == " ".join(item.answer.split()), item
        assert item.answer.count("«") == item.answer.count("»"), item


def test_no_question_and_no_term_comes_twice() -> None:
    items = [item for split in SPLITS for item in read_split(split)]
    assert len({item.question for item in items}) == len(items)
    assert len({item.term.casefold() for item in items}) == len(items)


def test_no_held_out_term_occurs_anywhere_in_training() -> None:
    train = read_split("train")
    leaks = [
        (held.term, item.where)
        for held in read_split("heldout")
        for item in train
        if mentions(f"{item.question} {item.answer}", held.term)
    ]
    assert leaks == []


def test_no_held_out_definition_is_given_for_another_term_in_training() -> None:
    train_definitions = {item.definition for item in read_split("train")}
    assert [item for item in read_split("heldout") if item.definition in train_definitions] == []


def test_training_order_is_shuffled() -> None:
    terms = [item.term for item in read_split("train")]
    rising = sum(first < second for first, second in itertools.pairwise(terms))
    assert 0.4 < rising / (len(terms) - 1) < 0.6


def test_readme_states_the_counts_of_the_files() -> None:
    readme = (DATASET / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        assert f"| `{split}.jsonl` | {len(read_split(split))} |" in readme
