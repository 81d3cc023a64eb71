"""Encodes data sets as prepare does: `python encode_records.py TOKENIZER WORKERS RANGE SOURCE...`, for tests that kill.

Prints one JSON object a source, of what was encoded or how it failed, and ends with a stage's exit code for the last.
The tokenizer comes pickled, since it takes torch to load one; RANGE is the records of a range.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

from qlora_trainer.__main__ import verdict
from qlora_trainer.data import ranges
from qlora_trainer.data.dataset import EncodeRanges, read_dataset
from qlora_trainer.data.reader import Records
from qlora_trainer.outcome import StageError, UserError
from qlora_trainer.prepare import encoding

from orchestrator.api.job import DatasetSource, TrainingSpec


def main(tokenizer: str, workers: str, records_of_a_range: str, *sources: str) -> int:
    """The exit code."""
    logging.basicConfig(level=logging.INFO)
    ranges.RANGE_RECORDS = int(records_of_a_range)
    loaded = pickle.loads(Path(tokenizer).read_bytes())
    code = 0
    try:
        with encoding(int(workers)) as encode:
            for source in sources:
                code, answer = encoded(source, loaded, encode)
                print(json.dumps(answer), flush=True)
    except StageError as error:
        code, result = verdict(error)
        print(result.model_dump_json())
    return code


def encoded(source: str, tokenizer: Any, encode: EncodeRanges) -> tuple[int, dict[str, Any]]:
    """The exit code and the answer for one source."""
    records = Records(source, split="train", scratch=Path(), field="spec.dataset.source")
    dataset = DatasetSource.model_validate({"source": source, "tooLong": "truncate", "evalFraction": "0.1"})
    try:
        read = read_dataset(records, tokenizer, dataset, TrainingSpec(sequence_length=256), encode)
    except UserError as error:
        code, result = verdict(error)
        return code, json.loads(result.model_dump_json())
    digest = hashlib.sha256()
    for split in (read.train, read.evaluation):
        for record, sample in zip(split.records, split.records.samples(), strict=True):
            digest.update(f"{sample}:{record.input_ids.tolist()}:{record.labels.tolist()}".encode())
    counts = [read.train.truncated, read.train.dropped, len(read.train.records), len(read.evaluation.records)]
    return 0, {"digest": digest.hexdigest(), "counts": counts, "warnings": read.warnings}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
