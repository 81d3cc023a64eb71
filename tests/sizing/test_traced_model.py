"""Models whose layers prepare traced: several kinds of them, and records that go through them one by one."""

from __future__ import annotations

import pytest

from orchestrator.api.layer_trace import EndInstants, LayerInstants, LayerKind, ModelTrace
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.sizing import footprint
from orchestrator.sizing.footprint import Footprint
from tests.builders import LLAMA_3_8B, make_spec

MIB = 1 << 20


def kind(kept: float, working: float, gradients: int) -> LayerKind:
    """A layer that keeps so many bytes a token, works with so many more, and has gradients of so many MiB."""
    return LayerKind(
        weight_bytes=90 * MIB,
        other_bytes=MIB,
        gradient_bytes=gradients * MIB,
        recomputed=LayerInstants(
            kept=(0, 8192), forward=((0, working),), backward=((0, kept + working), (200 * MIB, working))
        ),
        whole=LayerInstants(
            kept=(0, kept), forward=((0, working),), backward=((0, kept + 8192), (200 * MIB, kept, 0.5))
        ),
    )


def facts(
    layers: str, *, packed: bool = True, outside: tuple[tuple[float, ...], ...] = (), frozen: int | None = None
) -> ModelFacts:
    kinds = (kind(120_000, 150_000, 3), kind(40_000, 400_000, 90), kind(300_000, 20_000, 1))[: len(set(layers))]
    if frozen is not None:
        kinds = tuple(
            each.model_copy(update={"gradient_bytes": each.gradient_bytes * (n != frozen)})
            for n, each in enumerate(kinds)
        )
    end = EndInstants(first_kept=(0, 8192), released=(0, 8192), loss=(0, 24_576), norm=((0, 32_768),), outside=outside)
    trace = ModelTrace(
        packed=packed, kinds=kinds, layers=layers, recomputed=end, whole=end, other_bytes=MIB, adapter_parameters=MIB
    )
    found = LLAMA_3_8B.model_copy(update={"model_type": "glm4", "num_layers": len(layers), "trace": trace})
    return ModelFacts.model_validate_json(found.model_dump_json())


@pytest.mark.parametrize("layers", ["a" * 8, "aabbbbbb", "abababab", "abcabcab", "ccccaaab"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("outside", [(), ((0, 16_384),)])
def test_the_first_and_the_last_layer_of_each_kind_are_where_the_peak_is(
    monkeypatch: pytest.MonkeyPatch, layers: str, accumulation: int, outside: tuple[tuple[float, ...], ...]
) -> None:
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=accumulation, recompute_layers=0)

    def peaks() -> list[int]:
        found = Footprint(make_spec(sequence_length=2048), facts(layers, outside=outside), plan)
        return [found.peak_bytes(recomputing) for recomputing in range(len(layers) + 1)]

    chosen = peaks()
    monkeypatch.setattr(footprint._Layers, "ends", lambda self, _: range(self.count))
    assert chosen == peaks()
    assert chosen == sorted(chosen, reverse=True) or len(set(layers)) > 1


def test_weights_and_gradients_are_those_of_each_kind() -> None:
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=4, recompute_layers=8)
    items = {item.name: item.bytes for item in footprint.footprint(make_spec(), facts("aabbbbbb"), plan)}
    assert items["base weights, NF4"] == 8 * 90 * MIB
    assert items["adapter gradients, bf16"] == (2 * 3 + 6 * 90) * MIB


def test_records_that_go_one_by_one_need_working_memory_for_one() -> None:
    plan = MemoryPlan(micro_batch_size=4, accumulation_steps=1, recompute_layers=4, loss_chunk_tokens=64)
    spec = make_spec(sequence_length=1024)
    packed, apart = (Footprint(spec, facts("aaaa", packed=each), plan) for each in (True, False))
    assert apart._instants.largest_bytes(4) < packed._instants.largest_bytes(4), "a record is at work, not all four"


def test_layers_in_front_of_the_first_adapter_keep_nothing_though_the_decoder_holds_its_embeddings() -> None:
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=64)
    spec = make_spec(sequence_length=2048)
    all_adapted, some = (Footprint(spec, facts("bbbaaa", frozen=kind), plan) for kind in (None, 1))
    assert all_adapted._layers.kept(3, 0) == (8192 + 2 * 40_000) * 2048
    assert some._layers.kept(3, 0) == 8192 * 2048
    backward = [
        max(sum(each[1:]) for each in job._instants.all(0) if each.name == "a layer's backward pass")
        for job in (all_adapted, some)
    ]
    assert backward[0] - backward[1] == 2 * 40_000 * 2048


def test_embeddings_that_are_gone_before_the_loss_are_not_there_in_the_backward_pass() -> None:
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=64)
    job = Footprint(make_spec(sequence_length=2048), facts("aaaa"), plan)
    kept = [each.kept_bytes for each in job._instants.all(0) if each.name == "a layer's backward pass"]
    assert max(kept) == job._layers.kept(3, 0) - 8192 * 2048
