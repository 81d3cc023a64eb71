"""The controller's memory: flat over jobs that come and go, and every cache within bounds that are known in bytes.

`QLORA_MEMORY_JOBS` says how many jobs are submitted and deleted, each with the largest template.
"""

from __future__ import annotations

import ast
import gc
import json
import logging
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest
from pydantic import TypeAdapter

from orchestrator.adapters.kubernetes import pod_facts
from orchestrator.adapters.kubernetes.objects import NAME_SETS_KEPT, Parser
from orchestrator.api.job import (
    MAX_CHAT_TEMPLATE_BYTES,
    AdapterSpec,
    ModelSource,
    QLoRAJob,
    QLoRAJobSpec,
    TrainingSpec,
)
from orchestrator.api.layer_trace import KIND_LETTERS, EndInstants, LayerInstants, LayerKind, ModelTrace
from orchestrator.api.results import MAX_TERMINATION_MESSAGE_BYTES
from orchestrator.core.job import conditions
from orchestrator.sizing import plan_search
from orchestrator.sizing.hardware import CLASS_NAMES, gpu_class
from orchestrator.sizing.step_time import Work
from tests.builders import SMOLLM2_135M, make_spec, submitted_job
from tests.strangers.test_poison import World

JOBS = int(os.environ.get("QLORA_MEMORY_JOBS", "450"))
BATCH = 30
MOST_BYTES_A_JOB = 200
"""Of the slope: less than any object that stands for a job, and far less than a template."""
CODE = Path(__file__).parents[2] / "orchestrator"
CACHES = {
    "adapters/kubernetes/pod_facts.py _result": "lru_cache(maxsize=RESULTS_KEPT)",
    "api/data_sheets.py find_name": "lru_cache(maxsize=PRODUCTS_KEPT)",
    "api/package_data.py _content": "cache",  # two files of the package
    "core/job/conditions.py _known_words": "lru_cache(maxsize=WORDS_KEPT)",
    "sizing/footprint.py _adapter_parameters": "memoized(RESULTS_KEPT)",
    "sizing/footprint.py LayerWays.of": "lru_cache(maxsize=RESULTS_KEPT)",
    "sizing/footprint.py _all_kinds": "memoized(TRACES_KEPT)",
    "sizing/footprint.py _beside": "lru_cache(maxsize=RESULTS_KEPT)",
    "sizing/footprint.py _groups": "memoized(RESULTS_KEPT)",
    "sizing/footprint.py _kept_sums": "lru_cache(maxsize=TRACES_KEPT)",
    "sizing/footprint.py _traced_bytes": "memoized(TRACES_KEPT)",
    "sizing/footprint.py _turning_points": "lru_cache(maxsize=RESULTS_KEPT)",
    "sizing/footprint.py _weight_bytes": "memoized(RESULTS_KEPT)",
    "sizing/footprint.py layer_streamed_bytes": "memoized(RESULTS_KEPT)",
    "sizing/footprint.py traced_layer_bytes": "lru_cache(maxsize=RESULTS_KEPT)",
    "sizing/gpu_table.py gpu_table": "lru_cache(maxsize=TABLES_KEPT)",  # of settings alone
    "sizing/hardware.py find_card": "lru_cache(maxsize=PRODUCTS_KEPT)",
    "sizing/margins.py _learned": "lru_cache(maxsize=1)",
    "sizing/memory/handwritten_layer.py _walks": "lru_cache(maxsize=WALKS_KEPT)",
    "sizing/memory/linear_layers.py _gradient_bytes": "lru_cache(maxsize=MODELS_KEPT)",
    "sizing/memory/linear_layers.py linears": "memoized(MODELS_KEPT)",
    "sizing/memory/traced_layer.py _read": "cache",  # tables of the package, by its own types
    "sizing/memory/traced_rehearsal.py unpacked": "lru_cache(maxsize=WALKS_KEPT)",  # eight, and in no decision
    "sizing/plan_search.py _candidates": "memoized(RESULTS_KEPT)",
    "sizing/plan_search.py _search": "lru_cache(maxsize=JOBS_KEPT)",
}
"""Every function that keeps results, and what bounds them."""
MIB = 1 << 20
LARGEST_CACHES_BYTES = {"sizing": 160 * MIB, "termination messages": 32 * MIB, "words": 24 * MIB, "names": 8 * MIB}
"""With the worst that strangers can fill them with; the chart gives the controller 1 GiB."""


def caches() -> Iterator[tuple[str, str]]:
    for path in sorted(CODE.rglob("*.py")):
        name = str(path.relative_to(CODE))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for decorator in map(ast.unparse, node.decorator_list):
                    if decorator.split("(")[0].rpartition(".")[2] in {"cache", "lru_cache", "memoized"}:
                        yield f"{name} {node.name}", decorator
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Call):
                made = ast.unparse(node.func)
                if made.startswith("lru_cache(") and name != "sizing/memoized.py":
                    yield f"{name} {ast.unparse(node.args[0])}", made


def test_every_cache_is_known_and_bounded() -> None:
    assert dict(caches()) == CACHES


def bytes_of(fill: Callable[[], object]) -> int:
    """What is held after the call, beyond what was held before."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = fill()
        gc.collect()
        found = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    del kept
    return found


def largest_trace(number: int) -> ModelTrace:
    """The most that a termination message holds, and another one for each number."""
    polynomial = (number + 0.125, 90_000.5)
    layer = LayerInstants(kept=polynomial, forward=(polynomial,) * 12, backward=(polynomial,) * 12)
    end = EndInstants(first_kept=polynomial, loss=polynomial, norm=(polynomial,))
    kind = LayerKind(weight_bytes=1, other_bytes=1, gradient_bytes=1, recomputed=layer, whole=layer)
    letters = KIND_LETTERS[:3] * SMOLLM2_135M.num_layers
    trace = ModelTrace(
        packed=True,
        kinds=(kind,) * 3,
        layers=letters[: SMOLLM2_135M.num_layers],
        recomputed=end,
        whole=end,
        other_bytes=1,
        adapter_parameters=1,
    )
    text = trace.model_dump_json()
    assert 0.75 * MAX_TERMINATION_MESSAGE_BYTES < len(text) < MAX_TERMINATION_MESSAGE_BYTES
    return ModelTrace.model_validate_json(text)


def test_what_sizing_keeps_is_bounded_whatever_jobs_ask_for() -> None:
    classes, tried = tuple(gpu_class(name, 1) for name in CLASS_NAMES), 40

    def size_all() -> None:
        for number in range(tried):
            modules = tuple(f"{number:_>120}_{place:_>6}" for place in range(63))
            adapter = AdapterSpec(rank=16, target_modules=(*modules, "q_proj"))
            spec = make_spec().model_copy(
                update={"adapter": adapter, "training": TrainingSpec(sequence_length=3000 + number)}
            )
            facts = SMOLLM2_135M.model_copy(update={"model_type": "unheard", "trace": largest_trace(number)})
            found = plan_search.candidates(spec, facts, classes, work=Work(steps=10 + number))
            assert isinstance(found, tuple)
            assert len(found) > 5

    size_all()
    plan_search._candidates.cache_clear()  # pyright: ignore  # what fills once for all is there now
    each = bytes_of(size_all) / tried
    assert each * plan_search.RESULTS_KEPT < LARGEST_CACHES_BYTES["sizing"]


def test_what_is_kept_of_termination_messages_and_words_is_bounded() -> None:
    tried = 100

    def read_all() -> None:
        for number in range(tried):
            text = f'{{"failure": {{"reason": "UserError", "message": "{number:_>2000}"}}}}'
            pod_facts._result(text.ljust(MAX_TERMINATION_MESSAGE_BYTES))  # pyright: ignore[reportPrivateUsage]

    def say_all() -> None:
        for number in range(tried):
            conditions.words(f"模{number:_>500}")
            conditions.words(f"模{number:_>2000}")

    assert bytes_of(read_all) / tried * pod_facts.RESULTS_KEPT < LARGEST_CACHES_BYTES["termination messages"]
    assert bytes_of(say_all) / tried * conditions.WORDS_KEPT < LARGEST_CACHES_BYTES["words"]


def test_a_kubernetes_view_keeps_nothing_of_jobs_that_are_gone() -> None:
    """Parsed documents are shared for as long as somebody has them; sets of names are few."""
    parser = Parser()

    def churn(numbers: range) -> None:
        for number in numbers:
            parser.job(large_job(number).model_dump(mode="json", by_alias=True, exclude_none=True))

    churn(range(20))
    assert bytes_of(lambda: churn(range(20, 220))) < 200 * MOST_BYTES_A_JOB
    assert LARGEST_CACHES_BYTES["names"] >= NAME_SETS_KEPT * 2048


def large_job(number: int) -> QLoRAJob:
    """One with a template that no other has, as large as they may be."""
    head = f"{{{{ messages }}}}{number:08}"
    template = head + "t" * (MAX_CHAT_TEMPLATE_BYTES - len(head))
    job = submitted_job(f"large-{number}", model=ModelSource(source="file:///models/tiny", chat_template=template))
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": f"uid-{number}"})})


def live_and_die(world: World, numbers: range) -> None:
    """Jobs are submitted, worked on, half of them to their end, and deleted."""
    for number in numbers:
        world.store.create_job(large_job(number))
    for turn in range(8):
        world.controller.round()
        if turn % 2:
            world.runtime.finish(0 if turn < 5 else 80)
    for job in world.store.list_jobs():
        world.store.delete_job("team-a", job.metadata.name)
    for _ in range(500):
        world.controller.round()
        world.runtime.finish(143)
        if not world.store.list_jobs() and not world.runtime.stages:
            break
        time.sleep(0.02)  # MLflow is asked beside the loop
    world.controller.round()
    assert not world.controller.metrics.snapshot.jobs
    world.runtime.calls.clear()
    world.tracking.runs.clear()


def fill_the_string_cache() -> None:
    """pydantic keeps 16,384 short strings, whosever they are: full from the start, it does not look like a leak."""
    TypeAdapter(list[str]).validate_json(json.dumps([f"{number:_>40}" for number in range(200_000)]))


@pytest.mark.timeout(3600)
def test_memory_is_flat_over_jobs_that_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    world.store.delete_job("team-a", "healthy")
    logging.disable()
    numbers, sizes = [float(n) for n in range(BATCH, JOBS + 1, BATCH)], list[float]()
    tracemalloc.start()
    try:
        fill_the_string_cache()
        for end in numbers:
            live_and_die(world, range(int(end) - BATCH, int(end)))
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    settled = len(sizes) // 4  # what is filled once for all is filled by then
    slope = linear_regression(numbers[settled:], sizes[settled:]).slope
    with capsys.disabled():
        print(f"\n{JOBS} jobs of 48 KiB: {sizes[settled] / MIB:.2f} to {sizes[-1] / MIB:.2f} MiB, {slope:.1f} B a job")
    assert slope < MOST_BYTES_A_JOB


def test_a_leak_would_be_seen() -> None:
    """The bound is below what one kept name, spec and status take."""
    kept: list[Any] = []
    assert bytes_of(lambda: kept.append(QLoRAJobSpec.model_validate(large_job(1).spec.to_wire()))) > MOST_BYTES_A_JOB
