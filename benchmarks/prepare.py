"""How long prepare's data side takes, and what memory: `python -m benchmarks.prepare [--save prepare]`.

For each data set, and for a tenth of it, to see whether time grows in proportion: records, tokens, seconds, tokens a
second, the CPU seconds of the process and of those that render for it, their peak memory in MiB, and how loaded the
machine was. Each runs in a process of its own, on random words, with the tokenizer of the folder that QLORA_BENCH_MODEL
names (default: the demo's base model). `--only NAME --share 0.1` runs one of them.
"""

from __future__ import annotations

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

from benchmarks.report import argument_parser, emit

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


def _chats(share: float) -> Iterator[dict[str, Any]]:
    rng, words = random.Random(0), TOKENS_OF_A_CHAT // 4 - 6
    for _ in range(round(share * CHATS)):
        yield _chat(*(_words(rng, words) for _ in range(4)))


def _many(share: float) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for _ in range(round(share * MANY_RECORDS)):
        yield _chat(_words(rng, 8), _words(rng, 12))


def _long_line(share: float) -> Iterator[dict[str, Any]]:
    yield _chat("hello", "good morning " * round(share * LONG_LINE_BYTES / 13))
    yield _chat("hello", "good morning")


def _long_chat(share: float) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    yield _chat(*(_words(rng, 10) for _ in range(2 * round(share * TURNS))))


DATA_SETS: Mapping[str, tuple[Callable[[float], Iterator[dict[str, Any]]], int]] = {
    "chats_of_500_tokens": (_chats, SEQUENCE_LENGTH),
    "many_records": (_many, SEQUENCE_LENGTH),
    "line_of_36_mb": (_long_line, SEQUENCE_LENGTH),
    "chat_of_2000_turns": (_long_chat, 1 << 17),
}
"""What is written, of which share -> and how long a sequence is."""


def measure(name: str, share: float) -> dict[str, Any]:
    """Read, encode, arrange and write one data set in this process."""
    from qlora_trainer.data.dataset import arrange, read_dataset, write_rows
    from qlora_trainer.data.reader import Records
    from transformers import AutoTokenizer

    from orchestrator.api.job import DatasetSource, TrainingSpec

    make, sequence_length = DATA_SETS[name]
    tokenizer = AutoTokenizer.from_pretrained(os.environ.get("QLORA_BENCH_MODEL", DEFAULT_MODEL))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        with path.open("w") as file:
            file.writelines(f"{json.dumps(record)}\n" for record in make(share))
        size = path.stat().st_size
        before = _peak_bytes()
        began, cpu = perf_counter(), process_time()
        dataset = DatasetSource.model_validate({"source": f"file://{path}", "tooLong": "drop"})
        training = TrainingSpec(sequence_length=sequence_length)
        source = Records(dataset.source, split="train", scratch=Path(folder), field="spec.dataset.source")
        split = read_dataset(source, tokenizer, dataset, training).train
        rows = arrange(split, training)
        write_rows(Path(folder) / "train.parquet", split, rows)
        seconds = perf_counter() - began
    rendering = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "file_mib": round(size / MIB, 1),
        "records": split.samples,
        "dropped": split.dropped,
        "tokens": split.tokens,
        "sequences": len(rows),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(split.tokens / seconds),
        "cpu_seconds": round(process_time() - cpu, 2),
        "cpu_seconds_rendering": round(rendering.ru_utime + rendering.ru_stime, 2),
        "peak_mib": round(_peak_bytes() / MIB),
        "peak_mib_rendering": round(rendering.ru_maxrss / 1024),
        "peak_mib_before": round(before / MIB),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each data set in a process of its own, or the one that is asked for in this."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", choices=DATA_SETS)
    parser.add_argument("--share", type=float, default=1.0)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.share)))
        return
    figures: dict[str, object] = {}
    for name in DATA_SETS:
        for share in (1.0, 0.1):
            command = [sys.executable, "-m", "benchmarks.prepare", "--only", name, "--share", str(share)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            figures[name if share == 1 else f"{name}_a_tenth"] = found
    emit(figures, save=given.save)


if __name__ == "__main__":
    main()
