"""What is said about prepared data: its counts, records with their masks, and what is likely to be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import groupby
from typing import Any

from orchestrator.api.formats import MAX_SHOWN_RECORDS, ShownPart, ShownRecord
from orchestrator.api.job import QLoRAJobSpec, TrainingSpec
from orchestrator.api.results import MAX_WARNING_CHARACTERS, MAX_WARNINGS, PrepareResult
from orchestrator.api.words import on_one_line
from qlora_trainer.data.dataset import Split
from qlora_trainer.data.encoding import IGNORED_LABEL, EncodedRecord

MOST_TRUNCATED = Fraction(5, 100)
LEAST_SUPERVISED = Fraction(1, 100)
HIGHEST_RATE = 5e-5
"""Of preferences: ten times that of TRL's example of DPO with LoRA, and a quarter of the default."""
HIGH_RATE = "a high learning rate"
NOTHING_HELD_OUT = "nothing is held out"
RECORD_BY_RECORD, WITH_A_STATE = "record by record", "layers that carry a state"
OF_START = "the adapter that training begins with"
"""How the warnings begin that depend on more than the data."""
SHOWN_CHARACTERS = 1000
"""How much of a part of a record is shown, from its start and its end."""
SHOWN_PARTS = 40
"""How many parts of a record are shown, half of them from its start."""


def counts(result: PrepareResult, training: TrainingSpec) -> str:
    """The figures in one line."""
    room = result.train_sequences * training.sequence_length
    filled = f", {result.train_tokens / room:.1%} full" if training.packing else ""
    warmup = math.ceil(float(training.warmup_ratio) * result.steps)
    return (
        f"{result.train_records} training records with {result.train_tokens} tokens "
        f"({result.supervised_tokens / result.train_tokens:.1%} supervised) in {result.train_sequences} sequences"
        f"{filled}; "
        f"{result.eval_records} held out in {result.eval_sequences}; {result.truncated_records} truncated, "
        f"{result.dropped_records} dropped; {result.steps} steps, {warmup} of them warm-up"
    )


def mode_warning(separate_because: str) -> str:
    """What to know of a model whose records are trained one by one."""
    return (
        f"{RECORD_BY_RECORD}: the model's records are computed one at a time, with transformers' own attention, as "
        f"{separate_because}; that is right, and slower than packed rows where records are short"
    )


def state_warning(packages: Mapping[str, str | None], *, deterministic: bool) -> str | None:
    """What computes layers that carry a state, of packages by the versions that are installed; None without such."""
    if not packages:
        return None
    here = [f"{name} {version}" for name, version in packages.items() if version is not None]
    missing = [name for name, version in packages.items() if version is None]
    absent = f"; not in the trainer's image: {', '.join(missing)}" if missing else ""
    if here and not deterministic:
        return f"{WITH_A_STATE} are computed by {', '.join(here)} on a GPU, and sized by torch's code{absent}"
    exact = "; no other is known to give the same bits every time (training.deterministic)" if here else ""
    return (
        f"{WITH_A_STATE} are computed by transformers' own code in torch, which is right and several times slower than "
        f"kernels{exact}{absent}"
    )


def rate_warning(training: TrainingSpec) -> Iterator[str]:
    """What to know of a learning rate that is usual for other records."""
    if training.objective.type != "sft" and float(training.learning_rate) > HIGHEST_RATE:
        yield (
            f"{HIGH_RATE}: spec.training.learningRate is {training.learning_rate}, and preferences are trained with "
            "lower ones than other records (TRL's example of DPO with LoRA: 5e-6); lower it, unless held-out margins "
            "speak for it"
        )


def held_out_warning(spec: QLoRAJobSpec) -> Iterator[str]:
    """What is asked of evaluations that a job has none of; jobs of before it was said have been taken so."""
    if spec.evaluation.compares and not spec.dataset.holds_out:
        yield (
            f"{NOTHING_HELD_OUT}: spec.evaluation.keepBest and earlyStoppingPatience go by held-out records, and "
            "without any they have no effect; set spec.dataset.evalSource or spec.dataset.evalFraction"
        )


def data_warnings(train: Split, evaluation: Split) -> Iterator[str]:
    """What the counts and the splits give reason to say."""
    cut, samples = train.truncated + train.dropped, train.samples + train.dropped
    if cut > samples * MOST_TRUNCATED:
        yield (
            f"{train.truncated} of {samples} records are truncated and {train.dropped} dropped; raise "
            "spec.training.sequenceLength, or shorten the records"
        )
    if train.supervised < train.tokens * LEAST_SUPERVISED:
        yield (
            f"{train.supervised / train.tokens:.2%} of the tokens carry loss; see whether spec.dataset.format and "
            "spec.dataset.trainOn are meant so"
        )
    overlapping = _overlapping(train, evaluation)
    if overlapping:
        yield (
            f"{overlapping} of {len(evaluation.records)} evaluation records are training records as well, so that "
            "their loss says little; remove duplicates from the data set, or give another evalSource"
        )


def bounded(warnings: list[str]) -> tuple[str, ...]:
    """So many and so long as a result may have; where there are more, the last one says so."""
    most = MAX_WARNING_CHARACTERS
    if len(warnings) > MAX_WARNINGS:
        left_out = len(warnings) - MAX_WARNINGS + 1
        warnings = [*warnings[: MAX_WARNINGS - 1], f"{left_out} more warnings are in prepare's log"]
    return tuple(text if len(text) <= most else f"{text[: most - 3]}..." for text in map(on_one_line, warnings))


def _overlapping(train: Split, evaluation: Split) -> int:
    if not evaluation.records:
        return 0
    trained = {hash(record.input_ids.tobytes()) for record in train.records}
    return sum(hash(record.input_ids.tobytes()) in trained for record in evaluation.records)


def first_shown(tokenizer: Any, split: Split, samples: int, *, pairs: bool) -> tuple[ShownRecord, ...]:
    """The first records as text, or the first pairs of them."""
    if not pairs:
        return tuple(shown(tokenizer, record) for record in split.records[:samples])
    records = split.records[: 2 * min(samples, MAX_SHOWN_RECORDS // 2)]
    answers = ("chosen", "rejected") * len(records)
    return tuple(
        shown(tokenizer, record).model_copy(update={"answer": answer})
        for record, answer in zip(records, answers, strict=False)
    )


def shown(tokenizer: Any, record: EncodedRecord) -> ShownRecord:
    """A record as text, where what carries loss is told from what does not."""
    pairs = zip(record.input_ids, record.labels, strict=True)
    parts = [
        ShownPart(text=_shortened(tokenizer.decode([int(token) for token, _ in group])), supervised=supervised)
        for supervised, group in groupby(pairs, lambda pair: bool(pair[1] != IGNORED_LABEL))
    ]
    if len(parts) > SHOWN_PARTS:
        left_out = ShownPart(text=f" [... {len(parts) - SHOWN_PARTS} parts ...] ", supervised=False)
        parts = [*parts[: SHOWN_PARTS // 2], left_out, *parts[-SHOWN_PARTS // 2 :]]
    return ShownRecord(tokens=len(record.input_ids), supervised_tokens=record.supervised, parts=tuple(parts))


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    cut = len(text) - SHOWN_CHARACTERS
    return text if cut <= 0 else f"{text[:half]} [... {cut} characters ...] {text[-half:]}"


def in_brackets(record: ShownRecord) -> str:
    """The text of a record, what carries loss between ⟦ and ⟧."""
    return "".join(f"⟦{part.text}⟧" if part.supervised else part.text for part in record.parts)
