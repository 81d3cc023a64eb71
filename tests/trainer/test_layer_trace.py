"""Layers that no table knows are traced where a job is prepared, and sized by what the very layers take.

`QLORA_ALL_TYPES=1` steps each model both ways; one of the two, drawn for each, is tried otherwise.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peaks import (
    CONFIG,
    SCALARS_BYTES,
    TOKENS,
    peak_of_traced_layers,
    predicted,
    run_as_on_a_gpu,
    step_plan,
)
from peaks import write_random_model as write_model
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model import layer_trace, recorded_step
from qlora_trainer.model.layer_trace import Lengths, Untraceable, record_lengths, trace_layers, traced_facts
from qlora_trainer.model.loading import weightless_base
from torch.nn import functional
from transformers import AutoConfig

from orchestrator.api import trainer_facts
from orchestrator.api.job import AdapterSpec
from orchestrator.api.layer_trace import MOST_KINDS, ModelTrace
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.step_walk import TileWalk
from orchestrator.sizing.footprint import Footprint
from orchestrator.sizing.guess import guess_words
from orchestrator.sizing.memory.cuda_allocator import Block, Pool
from orchestrator.sizing.memory.timeline import allocated
from orchestrator.sizing.memory.traced_rehearsal import TracedJob, TrainStage
from tests.builders import make_spec

UNTABLED: dict[str, dict[str, Any]] = {
    "arcee": {"hidden_act": "relu2"},
    "cohere2": {"sliding_window": 64, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "glm": {"attention_bias": True},
    "minicpm3": {
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "glm4_moe": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 256, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 64,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 384, "hidden_act": "gelu"},
}  # fmt: skip
"""Types of which no table ships: gated and not, windows, heads that are turned in part, latent heads, experts."""
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA4: dict[str, dict[str, Any]] = {
    "heads of two sizes, the larger beyond flash attention": {
        "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4, "hidden_size_per_layer_input": 0,
    },
    "keys that are values, fewer in some layers": {
        "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4, "hidden_size_per_layer_input": 0,
        "global_head_dim": 128, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    },
    "layers with inputs of their own, the last ones with others' keys and values": {
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 3, "num_hidden_layers": 12, "num_kv_shared_layers": 6,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 768, "global_head_dim": 128,
        "use_double_wide_mlp": True,
    },
    "experts beside a dense layer": {
        "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4, "hidden_size_per_layer_input": 0,
        "global_head_dim": 128, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3,
        "moe_intermediate_size": 256,
    },
}  # fmt: skip


DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
"""Of a type whose layers carry a state over chunks of 64 tokens, one after the other."""
SHORT_CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}


def gemma4(shape: str) -> dict[str, Any]:
    """The text model of that shape, as transformers' class resolves its config."""
    fields = {**CONFIG, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 64, **GEMMA4[shape]}
    config = AutoConfig.for_model("gemma4_text", **fields)
    config.architectures = ["Gemma4ForCausalLM"]
    return config.to_dict()


def config_of(model_type: str, **fields: Any) -> dict[str, Any]:
    own = UNTABLED.get(model_type, {}) | fields
    return {**CONFIG, "model_type": model_type, "architectures": ["ForCausalLM"], **own}


def facts_of(
    config: dict[str, Any], adapter: AdapterSpec, *, packs: bool = True, record_tokens: int = 641
) -> ModelFacts:
    facts = ModelFacts.from_config(config, "main")
    return traced_facts(facts, AutoConfig.for_model(**config), adapter, packs=packs, record_tokens=record_tokens)


CONFIGS = {
    **{model_type: config_of(model_type) for model_type in UNTABLED},
    **{name: gemma4(name) for name in GEMMA4},
}
WAYS: dict[str, tuple[dict[str, Any], int, int]] = {
    "nothing recomputed": ({"dropout": "0"}, 0, 1),
    "some layers recomputed, dropout, accumulated": ({"dropout": "0.05", "rank": 40}, 2, 2),
}
DRAWN = random.Random("the ways of steps")
STEPS = [
    pytest.param(config, *WAYS[way], id=f"{way}-{name}")
    for name, config in CONFIGS.items()
    for way in (WAYS if os.environ.get("QLORA_ALL_TYPES") == "1" else [DRAWN.choice(list(WAYS))])
]


@pytest.mark.parametrize(("config", "fields", "recompute", "accumulation"), STEPS)
def test_a_training_step_takes_what_the_trace_of_its_layers_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    fields: dict[str, Any],
    recompute: int,
    accumulation: int,
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    monkeypatch.setattr(functional, "dropout", recorded_step.TracedDropout.apply_to)
    run_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(trainer_facts, "CUBLAS_WORKSPACE_BYTES", 0)
    write_model(tmp_path, config)
    adapter = AdapterSpec(**{"rank": 16, **fields})
    plan = step_plan(accumulation, recompute, loss_chunk_tokens=128)
    facts = facts_of(config, adapter)
    assert facts.trace is not None
    assert facts.trace.packed
    measured = peak_of_traced_layers(tmp_path, adapter, plan)
    expected = predicted(facts, adapter, plan) + SCALARS_BYTES
    # The first layer's input, of which the walk does not know when it goes; and the batch, which is not copied, but
    # counted where it has not gone before the peak.
    unsure = TOKENS * facts.hidden_size * 2 + 4 * 8 * TOKENS
    if facts.mixture is not None:  # and of the numbers that a router has for each token and expert a few go sooner
        unsure += 3 * 4 * TOKENS * facts.mixture.experts
    if config["model_type"] == "gemma4_text":  # what grows from layer to layer, as gradients to inputs and keys, counts
        unsure += expected // (25 if facts.layer_inputs else 100)  # as the largest
    less_than_an_allocation = 511  # what is smaller whatever the widths is left to the margin
    assert expected - unsure - SCALARS_BYTES <= measured <= expected + less_than_an_allocation


def base_of(config: dict[str, Any]) -> Any:
    PackedAttention().register()
    return weightless_base(AutoConfig.for_model(**config), torch.device("cpu"))[0]


def test_layers_that_take_the_same_are_one_kind_and_others_are_not() -> None:
    adapter = AdapterSpec(rank=16)
    windows = facts_of(config_of("cohere2"), adapter).trace
    assert windows is not None
    assert windows.layers == "aab", "the layer without a window turns no heads, which is fewer operations"
    of_passes = [{name: getattr(kind, name) for name in ("recomputed", "whole")} for kind in windows.kinds]
    without = [{name: each.model_copy(update={"operations": ()}) for name, each in kind.items()} for kind in of_passes]
    assert without[0] == without[1], "a window changes no tensor"
    base = base_of(config_of("glm", num_hidden_layers=4))
    narrow = base.get_decoder().layers[2].mlp
    for name in ("gate_up_proj", "down_proj"):
        part = getattr(narrow, name)
        sizes = part.in_features, part.out_features
        part.in_features, part.out_features = ({640: 320, 1280: 640}.get(size, size) for size in sizes)
    base.config.places = [0, 1, 2, 3]
    for index, layer in enumerate(base.get_decoder().layers):
        layer.mlp.factor, layer.added_idx = 0.5 + index, index
    mixed = trace_layers(base, adapter)
    assert mixed.layers == "aaba", "neither places nor factors nor a list of all layers change a tensor"
    wide, small = mixed.kinds
    assert small.weight_bytes < wide.weight_bytes
    assert small.gradient_bytes < wide.gradient_bytes
    assert mixed.adapter_parameters == (3 * wide.gradient_bytes + small.gradient_bytes) // 2


def test_a_type_with_a_table_is_not_traced_and_one_without_is_no_guess_once_it_was() -> None:
    llama = {**CONFIG, "model_type": "llama", "architectures": ["ForCausalLM"]}
    assert facts_of(llama, AdapterSpec()).trace is None
    before, after = ModelFacts.from_config(config_of("glm"), "main"), facts_of(config_of("glm"), AdapterSpec())
    assert "were never traced" in str(guess_words(AdapterSpec(), before))
    assert guess_words(AdapterSpec(), after) is None


def test_records_that_go_one_by_one_are_traced_with_the_models_own_attention() -> None:
    config = {**config_of("glm"), "model_type": "stablelm"}
    facts = facts_of(config, AdapterSpec(), packs=False)
    assert facts.trace is not None
    assert not facts.trace.packed
    assert guess_words(AdapterSpec(), facts) is None


GPT_J = {
    "architectures": ["ForCausalLM"], "model_type": "gptj", "n_embd": 256, "n_layer": 3, "n_head": 4, "n_inner": 512,
    "rotary_dim": 16, "n_positions": 2048, "vocab_size": 768, "tie_word_embeddings": False, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
"""Of a type that computes its scores by itself, in float32."""


def test_scores_are_four_times_there_where_a_gpu_goes_back_through_a_softmax() -> None:
    trace = traced(GPT_J, AdapterSpec(rank=16), packs=False)
    [kind] = trace.kinds
    scores, mask = 4 * 4, 2  # heads and bytes; a mask in 16 bits, which all layers share
    # The decoder holds what a layer attended with, in 16 bits, until the next has run: counted as kept by the first.
    held = squares([trace.recomputed.first_kept])[0] - squares([kind.recomputed.kept])[0]
    assert held == pytest.approx(scores / 2)
    # What the softmax gave, its gradient, their product, which a GPU makes by the way, and its input's gradient.
    assert max(squares(kind.recomputed.backward)) + held == pytest.approx(4 * scores + mask, rel=1e-3)
    assert max(squares(kind.whole.backward)) == pytest.approx(4 * scores + mask, rel=1e-3)
    assert max(squares(kind.recomputed.forward)) == pytest.approx(2 * scores + mask, rel=1e-3), "before and divided"
    assert squares([trace.recomputed.shared]) == [mask]
    assert kind.other_bytes > 4 * 16 * 2048, "a table of positions of its own"


def test_a_record_alone_has_no_mask_and_no_scores_where_transformers_leaves_its_attention_to_torch() -> None:
    trace = traced({**config_of("glm"), "model_type": "stablelm"}, AdapterSpec(rank=16), packs=False)
    [kind] = trace.kinds
    instants = [each for layer in (kind.recomputed, kind.whole) for each in (*layer.forward, *layer.backward)]
    ends = [end.shared for end in (trace.recomputed, trace.whole)]
    assert set(squares([*instants, *ends])) == {0}
    assert kind.recomputed.attention, "its kernel's workspace comes on top"


def traced(config: dict[str, Any], adapter: AdapterSpec, *, packs: bool = True) -> ModelTrace:
    trace = facts_of(config, adapter, packs=packs).trace
    assert trace is not None
    return trace


def squares(moments: Sequence[tuple[float, ...]]) -> list[float]:
    """The coefficients of the tokens' square."""
    return [polynomial[2] if len(polynomial) > 2 else 0 for polynomial in moments]


def test_biases_are_of_sixteen_bits_as_checkpoints_have_them_and_so_is_what_dora_takes_them_off() -> None:
    adapter = AdapterSpec(rank=16, use_dora=True, dropout="0", target_modules=("q_proj",))
    kept = [
        at((kind.whole.kept,), 1000)[0]
        for fields in ({"attention_bias": True}, {"attention_bias": False})
        for kind in traced(config_of("glm", **fields), adapter).kinds
    ]
    assert kept[0] == pytest.approx(kept[1], rel=1e-3)


def test_traced_records_are_padded_as_the_longest_is() -> None:
    for longest in (64, 384, 1000, 1024, 2049, 8192, 24_576, 24_577):
        lengths = record_lengths(longest)
        assert len(set(lengths)) == 3
        assert min(lengths) > 0
        assert {each % 256 for each in lengths} == {longest % 256}
        assert max(lengths) < 8192 + 256 or longest in lengths


def test_layers_that_go_from_chunk_to_chunk_take_what_their_largest_moments_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of("qwen3_5_text", **DELTA_NET)
    near, far = (129, 257, 385), (129, 321, 641)
    traces: list[ModelTrace] = []
    for tokens in (near, far):

        def lengths(_: int, own: Lengths = tokens) -> Lengths:
            return own

        monkeypatch.setattr(layer_trace, "record_lengths", lengths)
        trace = facts_of(config, AdapterSpec(rank=16), packs=False).trace
        assert trace is not None
        traces.append(trace)
    foreseen, seen = traces
    assert foreseen.layers == "aba"
    for kind, measured in zip(foreseen.kinds, seen.kinds, strict=True):
        for name in ("recomputed", "whole"):
            one, other = getattr(kind, name), getattr(measured, name)
            for moments in ("forward", "backward"):
                (told,), (taken,) = (at(getattr(each, moments), far[-1]) for each in (one, other))
                assert 0 < 0.999 * taken <= told <= 1.05 * taken
            assert at((one.kept,), far[-1]) == pytest.approx(at((other.kept,), far[-1]), rel=0.01)
            assert at((one.operations,), far[-1]) == pytest.approx(at((other.operations,), far[-1]), rel=0.01)
        assert kind.whole.operations[0] < kind.recomputed.operations[0] < 2 * kind.whole.operations[0]
    chunked, attending = foreseen.kinds
    assert len(attending.whole.operations) == 1, "as many for any number of tokens"
    assert chunked.whole.operations[1] > 0


def at(moments: Sequence[tuple[float, ...]], tokens: int) -> list[float]:
    """Bytes of polynomials."""
    return [sum(each * tokens**power for power, each in enumerate(polynomial)) for polynomial in moments]


def test_layers_without_adapters_are_traced_as_they_are_behind_one_that_has_them() -> None:
    config = config_of("lfm2", **SHORT_CONVOLUTIONS)
    trace = facts_of(config, AdapterSpec(rank=16, target_modules=("q_proj", "v_proj")), packs=False).trace
    assert trace is not None
    convolution, attention = trace.kinds
    assert convolution.gradient_bytes == 0 < attention.gradient_bytes
    assert at((convolution.whole.kept,), 1000)[0] > at((convolution.recomputed.kept,), 1000)[0] > 0


def test_a_model_that_cannot_be_traced_is_sized_by_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> ModelTrace:
        raise KeyError("what was not foreseen")

    monkeypatch.setattr("qlora_trainer.model.layer_trace.trace_layers", fails)
    with pytest.raises(Untraceable, match="KeyError: 'what was not foreseen'"):
        facts_of(config_of("glm"), AdapterSpec())


WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 64, "num_hidden_layers": 5, "vocab_size": 768}
LONG_ROW, LARGE = 4096, 4 << 20
"""Tensors as wide as a head are small, and so is whatever does not grow with the tokens but dense weights."""


class RecordingPool(Pool):
    """Says which large tensors come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []

    def take(self, size_bytes: float) -> Block:
        self._record(allocated(size_bytes), 1)
        return super().take(size_bytes)

    def drop(self, block: Block) -> None:
        self._record(block.size, -1)
        super().drop(block)

    def _record(self, size: int, sign: int) -> None:
        if size > LARGE:
            self.events.append(sign * size)


@pytest.mark.parametrize("model_type", ["cohere2", "minicpm3", "granitemoe"])
@pytest.mark.parametrize(
    ("fields", "recompute"),
    [
        pytest.param({"dropout": "0"}, 0, id="nothing recomputed"),
        pytest.param({"dropout": "0.05"}, 5, id="all layers recomputed, dropout"),
        pytest.param({"dropout": "0.05", "use_dora": True}, 5, id="all layers recomputed, DoRA"),
    ],
)
def test_large_tensors_come_and_go_in_the_order_that_is_rehearsed(
    monkeypatch: pytest.MonkeyPatch, model_type: str, fields: dict[str, Any], recompute: int
) -> None:
    monkeypatch.setattr(trainer_facts, "CUBLAS_WORKSPACE_BYTES", 512)
    layers = {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]} if model_type == "cohere2" else {}
    config = config_of(model_type, **(WIDE | layers))
    adapter, plan = AdapterSpec(rank=8, **fields), step_plan(1, recompute, loss_chunk_tokens=64)
    spec = make_spec(sequence_length=LONG_ROW, packing=False).model_copy(update={"adapter": adapter})
    job = Footprint(spec, facts_of(config, adapter), plan, records=1).rehearsed_trace(recompute)
    pool = RecordingPool()
    stage = TrainStage(without_kernels(job), pool)
    stage.set_up()
    pool.events.clear()
    stage.train(accumulated=False)
    base = base_of(config)
    events = recorded_step.run_step(base, adapter, tokens=LONG_ROW, recomputes=recompute > 0)
    assert pool.events == large(events)
    assert len(pool.events) > 500


def without_kernels(job: TracedJob) -> TracedJob:
    """The job but for what the kernels of attention and experts take by the way, which is no event of a step."""
    nothing = TileWalk(forward="", backward="")
    walk = job.walk.model_copy(update={"experts": (nothing,) * MOST_KINDS})
    return replace(job, walk=walk, attention=((),) * MOST_KINDS)


def large(events: Sequence[recorded_step.Event]) -> list[int]:
    """The bytes of large tensors as they come, and less than none as they go."""
    sizes = {event.number: allocated(event.size) for event in events if event.kind == "take"}
    found = [(event.kind, sizes.get(event.number, 0)) for event in with_ends_last(events)]
    return [size if kind == "take" else -size for kind, size in found if kind in ("take", "drop") and size > LARGE]


def with_ends_last(events: Sequence[recorded_step.Event]) -> list[recorded_step.Event]:
    """What was there before the first layer and goes when the decoder ends is rehearsed to go right before the loss."""
    marks = {event.name: place for place, event in enumerate(events) if event.kind == "mark"}
    early = {event.number for event in events[: marks["forward 0"]]}
    end, loss = marks["end"], marks["loss"]
    last = [event for event in events[end:loss] if event.kind == "drop" and event.number in early]
    return [*events[:end], *(each for each in events[end:loss] if each not in last), *last, *events[loss:]]
