"""How long prepare's data side takes, and what memory: `python -m benchmarks.prepare`.

Prints one JSON object: for each data set its records, tokens, seconds, tokens a second, the CPU seconds of the process
(rendering has one of its own), its peak memory in MiB, and how loaded the machine was. Each runs in a process of its
own, on random words, with the tokenizer of the folder that QLORA_BENCH_MODEL names (default: the demo's base model).
`--only NAME` runs one of them; `--records N` shortens the data set of many records.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

DEFAULT_MODEL = Path.home() / ".cache" / "qlora-orchestrator" / "smollm2-135m-instruct"
MIB = 1 << 20
CHATS, TOKENS_OF_A_CHAT = 10_000, 500
MANY_RECORDS = 1_000_000
LONG_LINE_BYTES = 36_000_000
TURNS = 2_000
SEQUENCE_LENGTH = 2_048
WORDS = ("the", "model", "writes", "what", "it", "has", "learnt", "from", "people", "who", "ask", "about", "cities")


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def _chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": said} for at, said in enumerate(texts)]}


def _chats(_: int) -> Iterator[dict[str, Any]]:
    rng, words = random.Random(0), TOKENS_OF_A_CHAT // 4 - 6
    for _ in range(CHATS):
        yield _chat(*(_words(rng, words) for _ in range(4)))


def _many(records: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for _ in range(records):
        yield _chat(_words(rng, 8), _words(rng, 12))


def _long_line(_: int) -> Iterator[dict[str, Any]]:
    yield _chat("hello", "good morning " * (LONG_LINE_BYTES // 13))
    yield _chat("hello", "good morning")


def _long_chat(_: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    yield _chat(*(_words(rng, 10) for _ in range(2 * TURNS)))


DATA_SETS: Mapping[str, tuple[Callable[[int], Iterator[dict[str, Any]]], int]] = {
    "chats of 500 tokens": (_chats, SEQUENCE_LENGTH),
    "many records": (_many, SEQUENCE_LENGTH),
    "one line of 36 MB": (_long_line, SEQUENCE_LENGTH),
    "a chat of 2,000 turns": (_long_chat, 1 << 17),
}
"""What is written -> and how long a sequence is."""


def measure(name: str, records: int) -> dict[str, Any]:
    """Read, encode and arrange one data set in this process."""
    from qlora_trainer.data.dataset import arrange, read_dataset
    from qlora_trainer.data.reader import Records
    from transformers import AutoTokenizer

    from orchestrator.api.job import DatasetSource, TrainingSpec

    make, sequence_length = DATA_SETS[name]
    tokenizer = AutoTokenizer.from_pretrained(os.environ.get("QLORA_BENCH_MODEL", DEFAULT_MODEL))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        with path.open("w") as file:
            file.writelines(f"{json.dumps(record)}\n" for record in make(records))
        size = path.stat().st_size
        before = _peak_bytes()
        began, cpu = perf_counter(), process_time()
        dataset = DatasetSource.model_validate({"source": f"file://{path}", "tooLong": "drop"})
        training = TrainingSpec(sequence_length=sequence_length)
        source = Records(dataset.source, split="train", scratch=Path(folder), field="spec.dataset.source")
        split = read_dataset(source, tokenizer, dataset, training).train
        rows = arrange(split, training)
        seconds = perf_counter() - began
    return {
        "file_mib": round(size / MIB, 1),
        "records": split.samples,
        "dropped": split.dropped,
        "tokens": split.tokens,
        "sequences": len(rows),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(split.tokens / seconds),
        "cpu_seconds": round(process_time() - cpu, 2),
        "peak_mib": round(_peak_bytes() / MIB),
        "peak_mib_before": round(before / MIB),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each data set in a process of its own, or the one that is asked for in this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=DATA_SETS)
    parser.add_argument("--records", type=int, default=MANY_RECORDS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.records)))
        return
    figures: dict[str, Any] = {}
    for name in DATA_SETS:
        command = [sys.executable, "-m", "benchmarks.prepare", "--only", name, "--records", str(given.records)]
        figures[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
