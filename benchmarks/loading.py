"""Seconds from the start of a process to its first training step, with the quantized weights cached.

    python -m benchmarks.loading --shape 8b [--sequence 2048] [--save loading_8b]

One process draws random weights and keeps them as the cache would. Fresh processes then load a folder that has a
config and no weights, so that only the cache can have given them, and train one step. The first finds Triton's cache
empty, the second as the first left it. The files are in the page cache, and modules are compiled, as all are in the
trainer's image. The card gets the weights while the libraries are imported, as in the train stage: `load_seconds` is
what is left to wait for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from benchmarks.report import argument_parser, emit


def main() -> None:
    """Measure, or be one of the measured processes."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--store", metavar="FOLDER", help="for the benchmark's own processes")
    parser.add_argument("--load", metavar="FOLDER", help="for the benchmark's own processes")
    arguments = parser.parse_args()
    if arguments.store:
        store(Path(arguments.store), arguments.shape)
    elif arguments.load:
        print(json.dumps(load(Path(arguments.load), arguments.sequence)))
    else:
        emit(measure(arguments), save=arguments.save)


def measure(arguments: Namespace) -> dict[str, object]:
    """Store once, load twice."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        environment = {
            **os.environ,
            "QLORA_MODEL_CACHE": str(scratch / "cache"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            "PYTHONPYCACHEPREFIX": str(scratch / "compiled"),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        model = str(scratch / "model")
        run(["--store", model, "--shape", arguments.shape], environment)
        words = ["--load", model, "--sequence", str(arguments.sequence)]
        run(words, {**environment, "TRITON_CACHE_DIR": str(scratch / "thrown-away")})  # compiles the modules
        runs = [json.loads(run(words, environment)) for _ in range(2)]
    return {"shape": arguments.shape, "triton_cache_empty": runs[0], "triton_cache_filled": runs[1]}


def run(words: list[str], environment: dict[str, str]) -> str:
    """The last line that one of our processes prints."""
    command = [sys.executable, "-m", "benchmarks.loading", *words]
    started = {**environment, "BENCHMARK_STARTED": repr(time.time())}
    return subprocess.run(command, env=started, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def store(folder: Path, shape: str) -> None:
    """The cache's entry for a model of the shape, whose folder keeps no weights."""
    from qlora_trainer.model.quantized_cache import QuantizedCache, entry_key, tensors_of

    from benchmarks.shapes import write_model
    from benchmarks.speed import PackedAttention, load_base, runtime

    device = runtime.set_up(threads=os.cpu_count() or 1, deterministic=True)
    base = load_base(write_model(folder, shape), device, PackedAttention())
    (folder / "random_weights.json").unlink()
    cache = QuantizedCache.from_environment()
    assert cache is not None
    cache.write(entry_key(folder, device), tensors_of(base))
    print("stored")


def load(folder: Path, sequence: int) -> dict[str, float]:
    """Seconds by phase, and since the process was started."""
    started = float(os.environ["BENCHMARK_STARTED"])
    from qlora_trainer import imports  # as `train` does it

    imports.load_torch()
    from qlora_trainer.model.quantized_cache import ReadAhead, tensors_of
    from qlora_trainer.training import runtime

    device = runtime.set_up(threads=os.cpu_count() or 1, deterministic=True)
    cached = ReadAhead(folder, device)
    imports.load_peft()
    from benchmarks.speed import AdapterSpec, Case, PackedAttention, Steps, add_adapter, load_base

    imported = time.time()
    attention = PackedAttention()
    base = load_base(folder, device, attention, cached)
    loaded = time.time()
    gigabytes = sum(tensor.nbytes for _, tensor in tensors_of(base)) / 1e9
    peft_model = add_adapter(base, AdapterSpec(rank=16, alpha=16, dropout="0"), seed=0)
    steps = Steps(peft_model, attention, Case(sequence=sequence, micro_batch=1), base.config.vocab_size)
    built = time.time()
    steps.timed()
    done = time.time()
    return {
        "import_seconds": round(imported - started, 2),
        "load_seconds": round(loaded - imported, 2),
        "gigabytes": round(gigabytes, 3),
        "adapter_seconds": round(built - loaded, 2),
        "first_step_seconds": round(done - built, 2),
        "seconds_after_imports": round(done - imported, 2),
        "seconds_to_first_step": round(done - started, 2),
    }


if __name__ == "__main__":
    main()
