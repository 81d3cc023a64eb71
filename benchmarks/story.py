"""The story that QLoRA is told by: a 70B model, 10,000 examples of 512 tokens, 3 epochs, one 48 GB card.

    python -m benchmarks.story [--save story]

Hours and dollars on an RTX A6000 come from the cost model (`orchestrator.sizing.step_time`) and NVIDIA's figures for
the card, so they are computed and not measured; the price of its hour is an assumption. The hours on the measured card
are those of `results/speed_70b_48gb.json`: tokens over tokens a second, under the allocator cap of the class. The same
model's prediction for that measurement stands beside it, so that its error is seen.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from benchmarks.report import RESULTS, argument_parser, emit
from benchmarks.shapes import LLAMA_SHAPES
from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing.footprint import offloaded_host_bytes
from orchestrator.sizing.hardware import Card, find_card, gpu_class
from orchestrator.sizing.plan_search import choose_plan, estimate
from orchestrator.sizing.step_time import StepTime, Work

EXAMPLES, TOKENS, EPOCHS, GLOBAL_BATCH, RANK = 10_000, 512, 3, 16, 16
STEPS = EXAMPLES * EPOCHS // GLOBAL_BATCH
HOURS_ASKED = 12.0
DOLLARS_AN_HOUR = 0.80
"""Assumed for an RTX A6000 by the hour."""
HOST_GIB = 128
"""Assumed of the workstation that the card is in."""
MEASURED = "peers_70b_48gb.json"
MEASURED_CASE = "512x4/66+activations+embeddings"


def main() -> None:
    """Compute, and print."""
    emit(story(), save=argument_parser(__doc__).parse_args().save)


def story() -> dict[str, object]:
    """The arithmetic, line by line."""
    measured = json.loads((RESULTS / MEASURED).read_text())
    case = measured["results"]["stacks"]["trainer"]["cases"][MEASURED_CASE]
    tokens = EXAMPLES * TOKENS * EPOCHS
    facts, spec = llama_3_70b(), make_spec()
    on_a6000 = computed(spec, facts, "RTX A6000")
    hours = float(str(on_a6000["hours"]))
    seconds = tokens / case["tokens_per_second"]
    return {
        "tokens": tokens,
        "tokens_are": f"{EXAMPLES} examples x {TOKENS} tokens x {EPOCHS} epochs",
        "steps": STEPS,
        "a6000_computed": {
            **on_a6000,
            "dollars": round(hours * DOLLARS_AN_HOUR, 2),
            "dollars_an_hour_assumed": DOLLARS_AN_HOUR,
            "reaches_12_hours": hours <= HOURS_ASKED,
            "epochs_in_12_hours": round(EPOCHS * HOURS_ASKED / hours, 2),
            "examples_for_3_epochs_in_12_hours": int(EXAMPLES * min(1.0, HOURS_ASKED / hours)),
            "tokens_a_second_for_12_hours": round(tokens / HOURS_ASKED / 3600, 1),
        },
        "measured": {
            "card": measured["card"],
            "allocator_cap_gib": measured["results"]["cap_gib"],
            "tokens_a_second": case["tokens_per_second"],
            "seconds": round(seconds),
            "hours": round(seconds / 3600, 2),
            "predicted_over_measured": round(prediction(spec, facts, case, measured) / case["step_seconds"], 3),
        },
    }


def computed(spec: QLoRAJobSpec, facts: ModelFacts, product: str) -> dict[str, object]:
    """A job on a class's smallest card, as fast as the given one."""
    offered = replace(gpu_class("48Gi", 1, [product]), host_bytes=HOST_GIB << 30)
    card = offered.card
    assert card is not None
    work = Work(steps=STEPS)
    plan = choose_plan(spec, facts, offered, work=work)
    assert plan is not None
    chosen = estimate(spec, facts, plan, offered, work=work)
    assert chosen.seconds is not None
    return {
        "card": asdict(card),
        "plan": plan.to_wire(),
        "peak_gib": round(chosen.peak_bytes / 2**30, 2),
        "usable_gib": round(chosen.usable_bytes / 2**30, 2),
        "host_gib_assumed": HOST_GIB,
        "host_gib_of_activations": round(offloaded_host_bytes(spec, facts, plan) / 2**30, 2),
        "micro_step_seconds_by_part": rounded(spec, facts, plan, card),
        "step_seconds": round(chosen.step_seconds or 0.0, 2),
        "tokens_a_second": round(GLOBAL_BATCH * TOKENS / (chosen.step_seconds or 1.0), 1),
        "hours_are": f"{STEPS} steps x {chosen.step_seconds:.2f} s / 3600",
        "hours": round(chosen.seconds / 3600, 2),
    }


def rounded(spec: QLoRAJobSpec, facts: ModelFacts, plan: MemoryPlan, card: Card) -> dict[str, float]:
    """Seconds of a micro-step by what the card does."""
    return {name: round(seconds, 3) for name, seconds in StepTime(spec, facts, Work()).parts(plan, card).items()}


def prediction(spec: QLoRAJobSpec, facts: ModelFacts, case: dict[str, object], measured: dict[str, object]) -> float:
    """Seconds that the cost model gives for the measured step."""
    card = find_card(str(measured["card"]).split(" (")[0])
    assert card is not None
    return StepTime(spec, facts, Work()).step_seconds(MemoryPlan.model_validate(case["plan"]), card)


def llama_3_70b() -> ModelFacts:
    """The published shape."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    return ModelFacts.from_config({**config, **LLAMA_SHAPES["70b"]}, "main")


def make_spec() -> QLoRAJobSpec:
    """The story's job."""
    return QLoRAJobSpec(
        model=ModelSource(source="hf://meta-llama/Meta-Llama-3-70B"),
        dataset=DatasetSource(source="file:///examples.jsonl"),
        adapter=AdapterSpec(rank=RANK, alpha=16, dropout="0"),
        training=TrainingSpec(
            epochs=str(EPOCHS),
            sequence_length=TOKENS,
            packing=False,
            global_batch_size=GLOBAL_BATCH,
            optimizer="paged_adamw_8bit",
        ),
    )


if __name__ == "__main__":
    main()
