"""Peak memory and step time of many jobs on one GPU: the rows that `orchestrator/sizing/footprint` is held against.

    python -m benchmarks.sizing --rows FILE [--seconds 540] [--models llama-3.1-8b ...]
        [--parts cut whole lora16 untabled] [--offloading activations] [--seed 2 --cases 4]

Every row is a job that the trainer's own code ran with random weights: base in NF4, adapter, check, an evaluation
where the case has one, two or three optimizer steps. Parts: `cut`, models of published width and two or four layers
under plans drawn from a seed per model; `whole`, models with all their layers under the allocator's cap of a GPU
class; `lora16`, the same adapter on a 16-bit base, computed by transformers and PEFT, as what QLoRA is compared with;
`untabled`, only where it is asked for, models of types that no table knows, cut like the others, whose layers are
traced here once all is measured, as prepare does; a seed draws other jobs of them, the last of a model under DoRA, or
with LoRA on its routed experts where PEFT can have that; `long`, only where it is asked for, layers by hand that keep
what attention gave where they recompute, or are attended by flash-attn-4, or both.

A row is written as soon as it is known, a failure too, and the order mixes models, so a run that is cut short by its
time is still balanced. Where `peak_allocated_bytes` was taken, the process had nothing of the cases before: gradients,
optimizer state, cuBLAS' workspaces and the allocator's cache are dropped in between.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.architectures import CONFIGS, UNTABLED, config
from benchmarks.report import argument_parser, circumstances

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["QLORA_ALLOW_RANDOM_WEIGHTS"] = "1"

import bitsandbytes as bnb
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from qlora_trainer.data.micro_batch import MicroBatch, collate
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.layer_trace import traced_facts
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from qlora_trainer.training import runtime
from qlora_trainer.training.gradients import clip, gradient_norm
from qlora_trainer.training.optimizer import AdapterOptimizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.api import trainer_facts
from orchestrator.api.job import AdapterSpec, TrainingSpec
from orchestrator.api.layer_tables import has_table
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan

GIB = 1 << 30
CUT_LAYERS = (4, 2)
CASES_A_ROUND = (6, 5)
"""Cases of a model with four layers. The first ones are repeated with two, which shows that bytes grow by the layer."""
REPEATED_WITH_FEWER_LAYERS = 3
SEQUENCES = (512, 1024, 2048, 2048, 4096, 4096, 8192, 8192, 16384, 16384, 32768)
RANKS = (8, 16, 16, 32, 64, 64, 128)
WIDE_SEQUENCES = (384, 1000, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 24576)
WIDE_RANKS = (4, 8, 16, 32, 64, 128, 256)
UNTABLED_CASES = 6
LONG = (
    "llama-3.1-8b",
    "qwen2.5-7b",
    "qwen3-8b",
    "llama-2-13b",
    "qwen3-0.6b",
    "mistral-7b",
    "smollm2-135m",
    "qwen3-30b-a3b",
)
LONG_SEQUENCES = (2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
EXPERT_LORA = ("qwen3-30b-a3b", "gpt-oss-20b")
"""Models whose jobs of other seeds have LoRA on routed experts: all, or the last where they are among the untabled."""
OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_32bit")
MOST_TOKENS = 32768
LONG_TOKENS = 16384
"""Steps of so many tokens or more are timed once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One job: everything that a row is predicted from, but the model."""

    adapter: AdapterSpec
    training: TrainingSpec
    plan: MemoryPlan
    records: int = 1
    """Records of each row of a micro-batch, equally long."""
    evaluation: bool = False
    cap_gib: float = 0.0

    def to_wire(self) -> dict[str, object]:
        """JSON types."""
        return {
            "adapter": self.adapter.to_wire(),
            "training": self.training.to_wire(),
            "plan": self.plan.to_wire(),
            "records": self.records,
            "evaluation": self.evaluation,
            "cap_gib": self.cap_gib,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Cases on one model, which is loaded once for them."""

    model: str
    layers: int
    cases: tuple[Case, ...]
    part: str

    @property
    def streamed_layers(self) -> int:
        """How many layers of the model are streamed from the host in its cases."""
        (found,) = {case.plan.streamed_layers for case in self.cases}
        return found


def main() -> None:
    """Run what fits into the time."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="file that gets a JSON line for every row")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--models", nargs="*", default=[name for name in CONFIGS | UNTABLED if name != "tiny"])
    parser.add_argument("--parts", nargs="*", default=["cut", "whole", "lora16"])
    parser.add_argument("--seed", type=int, default=0, help="draws other jobs of untabled models")
    parser.add_argument("--cases", type=int, default=UNTABLED_CASES, help="jobs of each untabled model")
    parser.add_argument("--offloading", choices=("activations", "embeddings"), help="only plans that offload these")
    arguments = parser.parse_args()
    bench = Bench(arguments.rows, deadline=time.monotonic() + arguments.seconds)
    for group in groups(arguments.models, arguments.parts, seed=arguments.seed, cases=arguments.cases):
        if arguments.offloading:
            chosen = (case for case in group.cases if arguments.offloading in case.plan.offload)
            group = replace(group, cases=tuple(chosen))
        if not group.cases:
            continue
        if bench.out_of_time():
            print("out of time", file=sys.stderr, flush=True)
            break
        bench.run(group)
    add_traces(arguments.rows)


# --- what is measured


def groups(models: list[str], parts: list[str], *, seed: int = 0, cases: int = UNTABLED_CASES) -> Iterator[Group]:
    """All groups in their order: a first round over every model, whole models, the 16-bit base, a second round."""
    first, second = ([], []) if "cut" not in parts else _rounds([model for model in models if model in CONFIGS])
    yield from first
    if "whole" in parts:
        yield from (group for group in WHOLE if group.model in models)
    if "lora16" in parts:
        yield from (group for group in LORA16 if group.model in models)
    yield from second
    if "long" in parts:
        for model in models:
            if model in LONG:
                yield Group(
                    model=model, layers=CUT_LAYERS[0], cases=tuple(_drawn_long(model, cases, seed)), part="long"
                )
    if "untabled" in parts:
        for model in models:
            if model in UNTABLED or model in EXPERT_LORA:
                drawn = tuple(_drawn(model, cases, seed=seed))
                yield Group(model=model, layers=CUT_LAYERS[0], cases=drawn, part="untabled")


def _rounds(models: list[str]) -> tuple[list[Group], list[Group]]:
    rounds: tuple[list[Group], list[Group]] = ([], [])
    for model in models:
        cases = list(_drawn(model, sum(CASES_A_ROUND)))
        first, second = cases[: CASES_A_ROUND[0]], cases[CASES_A_ROUND[0] :]
        repeated = tuple(first[:REPEATED_WITH_FEWER_LAYERS])
        rounds[0].append(Group(model=model, layers=CUT_LAYERS[0], cases=tuple(first), part="cut"))
        rounds[1].append(Group(model=model, layers=CUT_LAYERS[1], cases=repeated, part="cut"))
        rounds[1].append(Group(model=model, layers=CUT_LAYERS[0], cases=tuple(second), part="cut"))
    for order in rounds:
        random.Random(0).shuffle(order)
    return rounds


def _drawn(model: str, count: int, *, seed: int = 0) -> Iterator[Case]:
    """Plans and hyperparameters from a seed per model; each value of a list comes up about equally often."""
    draw = random.Random(f"{model} {seed}" if seed else model)
    experts = seed > 0 and model in EXPERT_LORA
    wide = model in UNTABLED or experts
    lists = (WIDE_SEQUENCES, WIDE_RANKS, OPTIMIZERS) if wide else (SEQUENCES, RANKS, OPTIMIZERS)
    sequences, ranks, optimizers = (_dealt(draw, values) for values in lists)
    for number in range(count):
        sequence, rank, optimizer = next(sequences), next(ranks), next(optimizers)
        sizes = (1, 1, 2, 3) if wide else (1, 1, 1, 2, 4)
        micro_batch = draw.choice([size for size in sizes if size * sequence <= MOST_TOKENS])
        accumulation = draw.choice((1, 2))
        recompute = draw.choice((0, 0, 2, 1024, 1024, 1024))
        few = draw.random() < 0.15 and not experts
        last = number == count - 1
        on_experts = experts and (last or model not in UNTABLED)
        yield Case(
            adapter=AdapterSpec(
                rank=rank,
                dropout="0" if on_experts else draw.choice(("0", "0.05")),
                target_modules=_few_targets(model) if few else "all-linear",
                use_dora=last and not experts,
                experts=on_experts,
            ),
            training=TrainingSpec(
                sequence_length=sequence,
                global_batch_size=micro_batch * accumulation,
                optimizer=optimizer,
                deterministic=draw.random() < 0.75,
            ),
            plan=MemoryPlan(
                micro_batch_size=micro_batch,
                accumulation_steps=accumulation,
                recompute_layers=recompute,
                offload=_offload(draw, model, recompute),
                loss_chunk_tokens=draw.choice((1024, 1024, 1024, 512, 4096)),
            ),
            records=draw.choice((1, 1, 4)),
            evaluation=draw.random() < 0.3,
        )


def _drawn_long(model: str, count: int, seed: int) -> Iterator[Case]:
    """Each of both ways about half of the time, and never none of them."""
    draw = random.Random(f"{model} long {seed}")
    sequences = _dealt(draw, LONG_SEQUENCES)
    for case in _drawn(model, count, seed=seed):
        sequence = next(sequences)
        size = draw.choice([size for size in (1, 2) if size * sequence <= MOST_TOKENS])
        flash, kept = draw.choice(((True, False), (True, True), (False, True)))
        steps = case.plan.accumulation_steps
        plan = case.plan.model_copy(
            update={
                "micro_batch_size": size,
                "recompute_layers": draw.choice((2, 1024, 1024) if kept else (0, 2, 1024)),
                "attention": "flash-attn-4" if flash else "own",
                "keep_attention": kept,
            }
        )
        training = case.training.model_copy(update={"sequence_length": sequence, "global_batch_size": size * steps})
        adapter = case.adapter.model_copy(update={"use_dora": False, "experts": False})  # which are not by hand
        yield replace(case, adapter=adapter, plan=plan, training=training)


def _dealt(draw: random.Random, values: tuple[Any, ...]) -> Iterator[Any]:
    while True:
        yield from draw.sample(values, len(values))


def _offload(draw: random.Random, model: str, recompute: int) -> tuple[Any, ...]:
    if model in UNTABLED or model in EXPERT_LORA:
        return ()  # as `sizing/plan_search` has it
    of = CONFIGS[model]
    fused, tied = of["model_type"] in trainer_facts.HANDWRITTEN_TYPES, of["tie_word_embeddings"]
    activations = ("activations",) if fused and recompute and draw.random() < 0.3 else ()
    return (*activations, *(("embeddings",) if not tied and draw.random() < 0.3 else ()))


def _few_targets(model: str) -> tuple[str, ...]:
    kind = (CONFIGS | UNTABLED)[model]["model_type"]
    fused = {
        "phi3": ("qkv_proj",), "falcon": ("query_key_value",), "gpt_neox": ("query_key_value",),
        "deepseek_v2": ("q_proj", "kv_b_proj"),
    }  # fmt: skip
    return fused.get(kind, ("q_proj", "v_proj"))


def _case(*, rank: int, cap_gib: float = 0.0, recompute: int = 1024, sequence: int = 2048, **plan: Any) -> Case:
    return Case(
        adapter=AdapterSpec(rank=rank, dropout="0.05"),
        training=TrainingSpec(sequence_length=sequence, global_batch_size=2, optimizer="paged_adamw_32bit"),
        plan=MemoryPlan(micro_batch_size=1, accumulation_steps=2, recompute_layers=recompute, **plan),
        cap_gib=cap_gib,
    )


def _whole(model: str, *cases: Case, part: str = "whole") -> Group:
    return Group(model=model, layers=config(model)["num_hidden_layers"], cases=cases, part=part)


CAP_24, CAP_48, CAP_80 = 21.5, 44.0, 78.0
WHOLE = (
    _whole("llama-2-13b", _case(rank=64, cap_gib=CAP_24), _case(rank=64, cap_gib=CAP_24, recompute=20)),
    _whole("llama-3.1-70b", _case(rank=16, cap_gib=CAP_48)),
    _whole("llama-65b", _case(rank=16, cap_gib=CAP_48)),
    _whole("llama-3.1-8b", _case(rank=16, cap_gib=CAP_24), _case(rank=64, recompute=0)),
    _whole("smollm2-135m", _case(rank=16), _case(rank=128, recompute=0, sequence=8192)),
    _whole("qwen2.5-7b", _case(rank=16, cap_gib=CAP_24, sequence=8192)),
    _whole("qwen3-8b", _case(rank=16, cap_gib=CAP_24, sequence=4096)),
    _whole("gemma-2-2b", _case(rank=16, cap_gib=CAP_24)),
    _whole("olmo-2-7b", _case(rank=16, cap_gib=CAP_24)),
    _whole("qwen3-30b-a3b", _case(rank=16, cap_gib=CAP_24)),
    _whole(
        "gpt-oss-20b",
        _case(rank=16, cap_gib=CAP_24),
        _case(rank=16, cap_gib=CAP_24, sequence=1024),
        _case(rank=16, cap_gib=CAP_24, sequence=8192),
        _case(rank=64, cap_gib=CAP_24, sequence=16384),
    ),
    _whole("gpt-oss-120b", _case(rank=16, cap_gib=CAP_80), _case(rank=16, cap_gib=CAP_80, sequence=8192)),
    _whole("phi-3.5-moe-42b", _case(rank=16, cap_gib=CAP_48)),
    _whole("gemma-3-27b", _case(rank=16, cap_gib=CAP_24), _case(rank=16, cap_gib=CAP_48, sequence=4096)),
    _whole("gemma-4-2b-like", _case(rank=16, cap_gib=CAP_24), _case(rank=64, recompute=0, sequence=4096)),
    _whole("gemma-4-31b-like", _case(rank=16, cap_gib=CAP_24), _case(rank=16, cap_gib=CAP_48, sequence=8192)),
    _whole("qwen3.5-35b-a3b", _case(rank=16, cap_gib=CAP_48), _case(rank=16, cap_gib=CAP_48, sequence=8192)),
)
LORA16 = (
    _whole("llama-2-13b", _case(rank=64), _case(rank=64, recompute=0), part="lora16"),
    _whole("llama-3.1-8b", _case(rank=16), _case(rank=16, recompute=0), part="lora16"),
)


# --- measuring


class Bench:
    """The card, the file of rows, and one model at a time."""

    job: type[Job]

    def __init__(self, rows: Path, *, deadline: float, timed_seconds: float = 0.0) -> None:
        self._device = runtime.set_up(threads=os.cpu_count() or 1, deterministic=True)
        self._rows = rows
        self._deadline = deadline
        self._timed_seconds = timed_seconds
        self._circumstances = circumstances()
        self._attention = PackedAttention()
        rows.parent.mkdir(parents=True, exist_ok=True)

    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self._deadline

    def run(self, group: Group) -> None:
        """Every case of a group, as far as time allows."""
        began = time.perf_counter()
        self._fresh()
        base: PreTrainedModel | None = None
        try:
            base = self._load(group)
            loaded = {
                "base_bytes": _allocated(self._device),
                "load_seconds": round(time.perf_counter() - began, 2),
            }
        except Exception as error:  # noqa: BLE001 - a model that cannot be built is a row, like all else
            self._write(group, None, {"error": _words(error)})
            return
        for case in group.cases:
            if self.out_of_time():
                return
            figures = self._measured(base, group, case)
            self._write(group, case, {**loaded, **figures})

    def _load(self, group: Group) -> PreTrainedModel:
        self._cap(0.0)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(config(group.model, group.layers)))
            (folder / "random_weights.json").write_text(json.dumps({"seed": 0}))
            if group.part == "lora16":
                return self._load_in_16_bits(folder)
            return load_base(folder, self._device, self._attention, streamed_layers=group.streamed_layers)

    def _load_in_16_bits(self, folder: Path) -> PreTrainedModel:
        own = AutoConfig.from_pretrained(folder, local_files_only=True)
        with self._device:
            base = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16, attn_implementation="sdpa")
        base.config.use_cache = False
        return base.requires_grad_(False)

    def _measured(self, base: PreTrainedModel, group: Group, case: Case) -> dict[str, object]:
        torch.use_deterministic_algorithms(case.training.deterministic and group.part != "lora16")
        kind = SixteenBitJob if group.part == "lora16" else self.job
        job = kind(base, case, self._attention, self._device)
        self._fresh()
        self._cap(case.cap_gib)
        figures: dict[str, object] = {}
        try:
            figures = job.measure(self._timed_seconds)
        except UserError as error:
            figures = {"refused": str(error)}
        except Exception as error:  # noqa: BLE001 - running out of memory is a row, and so is everything unforeseen
            figures = {"error": _words(error)}
        figures |= self._peaks()
        job.leave()
        del job
        self._fresh()
        table: Any = base.get_input_embeddings()
        table.weight.data = table.weight.data.to(self._device)  # where the case had moved it to the host
        return figures

    def _cap(self, gib: float) -> None:
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(gib * GIB / total if gib else 1.0)

    def _fresh(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            _forget_workspaces()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peaks(self) -> dict[str, object]:
        if self._device.type != "cuda":
            return {}
        torch.cuda.synchronize()
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def _write(self, group: Group, case: Case | None, figures: dict[str, object]) -> None:
        row = {
            "part": group.part,
            "model": group.model,
            "config": config(group.model, group.layers),
            **(case.to_wire() if case is not None else {}),
            **figures,
            "multiprocessors": _multiprocessors(),
            **self._circumstances,
        }
        with self._rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(group.part, group.model, group.layers, json.dumps(figures)[:400], file=sys.stderr, flush=True)


class Job:
    """A case in the trainer's own hands."""

    def __init__(self, base: PreTrainedModel, case: Case, attention: PackedAttention, device: torch.device) -> None:
        self._base, self._case, self._device = base, case, device
        self._attention = attention
        self._random = np.random.RandomState(0)
        self._peft_model: PeftModel | None = None

    def measure(self, timed_seconds: float) -> dict[str, object]:
        """Add the adapter, check, evaluate where asked, train, for a step or two or more until that time is timed."""
        self._peft_model = add_adapter(self._base, self._case.adapter, seed=0)
        self._model = TrainingModel(self._peft_model, self._case.plan, self._attention, 0.0)
        built = _allocated(self._device)
        self._model.check()
        checked = _allocated(self._device)
        self._optimizer = AdapterOptimizer(self._model.trainable(), self._case.training)
        self._parameters = [parameter for _, parameter in self._model.trainable()]
        if self._case.evaluation:
            self._evaluate()
        tokens = self._case.training.sequence_length * self._case.plan.micro_batch_size
        steps = [self._step() for _ in range(2 if tokens >= LONG_TOKENS else 3)]
        while sum(seconds for seconds, _ in steps[1:]) < timed_seconds:
            steps.append(self._step())
        return {
            "fused": self._model.fused is not None,
            "separate": self._model.separate,
            "flash_attention": self._attention.flash is not None,
            "with_adapter_bytes": built,
            "after_check_bytes": checked,
            "between_steps_bytes": _allocated(self._device),
            "paged_bytes": self._optimizer.paged_bytes(),
            "first_step_seconds": round(steps[0][0], 4),
            "step_seconds": round(median(seconds for seconds, _ in steps[1:]), 5),
            "loss": round(steps[-1][1], 4),
        }

    def leave(self) -> None:
        """Give the base back as it was."""
        for module in self._base.modules():
            module.__dict__.pop("forward", None)
        if self._peft_model is not None:
            self._peft_model.unload()
            self._base.__dict__.pop("peft_config", None)

    @torch.no_grad()
    def _evaluate(self) -> None:
        self._model.eval()
        float(self._model.loss(self._batch(), divisor=1.0))

    def _step(self) -> tuple[float, float]:
        """A step as the loop makes it: seconds and loss."""
        batches = [self._batch() for _ in range(self._case.plan.accumulation_steps)]
        began = time.perf_counter()
        self._model.train()
        total = torch.zeros((), device=self._model.device)
        for batch in batches:
            loss = self._model.accumulate(batch, divisor=float(sum(len(b.supervised) for b in batches)))
            total += loss
        norm = gradient_norm(self._parameters)
        answer = total.item()
        clip(self._parameters, norm.item(), 0.3)
        self._optimizer.step(1e-4)
        return time.perf_counter() - began, answer

    def _batch(self) -> MicroBatch:
        """Rows of equal records, every token but a record's last of which carries loss."""
        sequence, records = self._case.training.sequence_length, self._case.records
        places = np.arange(sequence, dtype=np.int32) % (sequence // records)
        vocabulary = self._base.config.vocab_size
        rows = [
            self._random.randint(5, vocabulary, size=sequence).astype(np.int32)
            for _ in range(self._case.plan.micro_batch_size)
        ]
        return collate([(ids, ids, places) for ids in rows])


Bench.job = Job


# --- tracing


def add_traces(rows: Path) -> None:
    """Trace the layers of rows of types that no table knows, and write that into the file."""
    raw = [json.loads(line) for line in rows.read_text().splitlines()]
    wanted = [each for each in raw if "separate" in each and "trace" not in each and not _has_table(each)]
    if not wanted:
        return
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) // 2), mp_context=get_context("spawn")) as pool:
        for each, trace in zip(wanted, pool.map(_traced, wanted), strict=True):
            each["trace"] = trace
    rows.write_text("".join(json.dumps(each) + "\n" for each in raw))


def _has_table(row: dict[str, Any]) -> bool:
    adapter = AdapterSpec.model_validate(row["adapter"])
    return has_table(row["config"]["model_type"], use_dora=adapter.use_dora, experts=adapter.experts)


def _traced(row: dict[str, Any]) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    own = AutoConfig.for_model(**row["config"])
    facts = ModelFacts.from_config(row["config"], "main")
    adapter = AdapterSpec.model_validate(row["adapter"])
    record_tokens = row["training"]["sequenceLength"] // row["records"]
    found = traced_facts(facts, own, adapter, packs=not row["separate"], record_tokens=record_tokens).trace
    return None if found is None else found.to_wire()


class SixteenBitJob:
    """LoRA on a 16-bit base as PEFT's and transformers' documentation has it; the optimizer is the same."""

    def __init__(self, base: PreTrainedModel, case: Case, _attention: PackedAttention, device: torch.device) -> None:
        self._base, self._case, self._device = base, case, device
        self._peft_model: PeftModel | None = None

    def measure(self, _timed_seconds: float) -> dict[str, object]:
        """Three steps under bf16 autocast, as transformers' Trainer runs them."""
        model = self._build()
        optimizer = bnb.optim.PagedAdamW32bit(self._parameters, lr=1e-4)
        model.train()
        steps = [self._step(model, optimizer) for _ in range(3)]
        return {"step_seconds": round(median(steps[1:]), 5)}

    def _build(self) -> PeftModel:
        torch.manual_seed(0)
        adapter, base = self._case.adapter, self._base
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=float(adapter.dropout),
            target_modules="all-linear",
        )
        model: Any = get_peft_model(base, settings)
        self._peft_model = model
        if self._case.plan.recompute_layers:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        else:
            base.gradient_checkpointing_disable()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        return model

    def leave(self) -> None:
        """Give the base back as it was."""
        if self._peft_model is not None:
            self._peft_model.unload()
        self._base.__dict__.pop("peft_config", None)

    def _step(self, model: PeftModel, optimizer: torch.optim.Optimizer) -> float:
        began = time.perf_counter()
        for _ in range(self._case.plan.accumulation_steps):
            shape = (self._case.plan.micro_batch_size, self._case.training.sequence_length)
            ids = torch.randint(5, self._base.config.vocab_size, shape, device=self._device)
            with torch.autocast(self._device.type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _forget_workspaces() -> None:
    """cuBLAS' own: torch has no public name for that."""
    private: Any = torch
    private._C._cuda_clearCublasWorkspaces()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 0


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).split('. GPU')[0][:300]}"


if __name__ == "__main__":
    main()
