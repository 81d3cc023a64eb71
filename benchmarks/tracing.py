"""What tracing a model of a type without a table costs, as prepare does it, and a plan from such a trace.

    python -m benchmarks.tracing [--models apertus-70b ...] [--save tracing]

Each model in a process of its own, on one core: seconds of the trace, after the libraries are imported, the peak
memory of the process and what it had before; then the milliseconds of `plan_search.candidates` on the processor, for
adapters of ranks that it has not seen, against all classes of whole cards.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

from benchmarks.architectures import UNTABLED, config
from benchmarks.planning import CLASSES, make_spec
from benchmarks.report import argument_parser, emit
from orchestrator.api.job import AdapterSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.sizing.plan_search import candidates

LARGE: dict[str, dict[str, Any]] = {
    "apertus-70b": {
        **UNTABLED["apertus-8b"],
        "hidden_size": 8192,
        "intermediate_size": 43008,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
RANKS = range(2, 42)


def main() -> None:
    """Measure each model in a process of its own, or the one that is asked for in this."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=[*LARGE, *UNTABLED])
    parser.add_argument("--only", help="measure this model here")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only)))
        return
    found: dict[str, object] = {}
    for name in arguments.models:
        command = [sys.executable, "-m", "benchmarks.tracing", "--only", name]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name.replace(".", "_")] = json.loads(said)
    emit(found, save=arguments.save)


def measure(name: str) -> dict[str, object]:
    """Trace one model here, and plan jobs of it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from qlora_trainer.model.layer_trace import traced_facts
    from transformers import AutoConfig

    torch.set_num_threads(1)
    described: dict[str, Any] = {"architectures": ["ForCausalLM"], **LARGE[name]} if name in LARGE else config(name)
    own: Any = AutoConfig.for_model(**described)
    facts = ModelFacts.from_config(described, "main")
    before = _peak_mib()
    began = time.perf_counter()
    traced = traced_facts(facts, own, AdapterSpec(rank=16), packs=True, record_tokens=2048)
    seconds = time.perf_counter() - began
    assert traced.trace is not None, "a type without a table"
    candidates(make_spec(rank=1, sequence_length=1024), traced, CLASSES)
    plans: list[float] = []
    for rank in RANKS:
        began = time.process_time()
        candidates(make_spec(rank=rank, sequence_length=2048), traced, CLASSES)
        plans.append(1000 * (time.process_time() - began))
    return {
        "seconds": round(seconds, 2),
        "peak_mib": _peak_mib(),
        "peak_mib_before": before,
        "kinds_of_layers": len(traced.trace.kinds),
        "plan_ms": round(median(plans), 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _peak_mib() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
