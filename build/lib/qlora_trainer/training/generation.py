"""How a tuned model is to be asked: the tokens that end its answers, for whoever generates with the adapter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_trainer.data.micro_batch import PreparedRows
from qlora_trainer.model.training_model import TrainingModel

ROWS_LOOKED_AT = 256
TAIL_TOKENS = 4
"""Templates write up to this many tokens from the one that ends a turn on, a newline for example."""
SMALLEST_SHARE = 0.05
"""Of the answers that a token must end to count: records that were cut end anywhere."""

Json = dict[str, Any]  # Any: whatever JSON holds


def generation_config(model: TrainingModel, rows: PreparedRows, tokenizer: Path) -> Json:
    """The content of generation_config.json: the base's own, ended by its eos and by what ended the trained answers."""
    base: Any = getattr(model.base, "generation_config", None)  # Any: transformers' own
    known: Json = base.to_diff_dict() if base is not None else {}
    eos = known.get("eos_token_id", getattr(model.base.config, "eos_token_id", None))
    own: Any = eos if isinstance(eos, list) else [] if eos is None else [eos]  # pyright: ignore[reportUnknownVariableType]
    trained = answer_ends(rows, special_tokens(tokenizer))
    return {**known, "eos_token_id": list(dict.fromkeys([*own, *trained]))}


def special_tokens(tokenizer: Path) -> frozenset[int]:
    """The ids of a tokenizer folder's special tokens."""
    file = tokenizer / "tokenizer.json"
    added: list[Json] = json.loads(file.read_text())["added_tokens"] if file.is_file() else []
    return frozenset(token["id"] for token in added if token["special"])


def answer_ends(rows: PreparedRows, special: frozenset[int]) -> list[int]:
    """The special tokens that supervised stretches end with."""
    ends = [
        next((token for token in reversed(tail) if token in special), None)
        for index in range(min(len(rows), ROWS_LOOKED_AT))
        for tail in _tails(rows, index)
    ]
    found = Counter(end for end in ends if end is not None)
    return sorted(token for token, times in found.items() if times >= SMALLEST_SHARE * len(ends))


def _tails(rows: PreparedRows, index: int) -> Iterator[list[int]]:
    """The last tokens of each supervised stretch of a row."""
    ids, labels, positions = rows.row(index)
    supervised = labels >= 0
    starts_record = positions == 0
    last = supervised & np.append(~supervised[1:] | starts_record[1:], True)
    for end in np.flatnonzero(last):
        begin = int(end)
        while begin > 0 and supervised[begin - 1] and not starts_record[begin] and end - begin < TAIL_TOKENS - 1:
            begin -= 1
        yield [int(token) for token in ids[begin : end + 1]]
