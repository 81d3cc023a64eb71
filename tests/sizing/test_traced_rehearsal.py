"""What is reserved for layers that prepare traced follows from the order in which their tensors come and go."""

from __future__ import annotations

import zlib
from base64 import b85encode
from dataclasses import replace
from itertools import pairwise

import pytest

from orchestrator.api import trainer_facts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.step_walk import (
    ATTENTION,
    EXPERTS,
    EXPERTS_BACK,
    FIRST_SIZE,
    GRAD_SLOTS,
    GRADIENT,
    INPUT_SLOTS,
    MOST_JSON_BYTES,
    OWN_SLOTS,
    PRODUCT,
    PartWalk,
    PartWalks,
    StepWalk,
    TileWalk,
    coded,
)
from orchestrator.sizing.footprint import Footprint
from orchestrator.sizing.memory.traced_rehearsal import TracedJob, reserved_bytes
from tests.builders import make_spec
from tests.sizing.test_traced_model import MIB, facts

STREAM, WIDE, GRAD, HALF, HUGE = (2 * (FIRST_SIZE + number) for number in range(5))
"""Codes of tensors of 20, 100, 40, 60 and 1000 MiB."""
SIZES = ((),) * FIRST_SIZE + ((20 * MIB,), (100 * MIB,), (40 * MIB,), (60 * MIB,), (1000 * MIB,))
MIXING = (2 * EXPERTS, 2 * EXPERTS_BACK)


def drop(slot: int) -> int:
    return 2 * slot + 1


def layer(*, keeps: bool, backward: tuple[int, ...] = ()) -> PartWalk:
    """Takes its output and a wide tensor, which it keeps or not."""
    forward = (STREAM, WIDE) if keeps else (STREAM, WIDE, drop(OWN_SLOTS + 1))
    again = () if keeps else (WIDE,)
    own = OWN_SLOTS + 1 if keeps else OWN_SLOTS
    back = (*again, *backward, 2 * GRADIENT, GRAD, STREAM, drop(GRAD_SLOTS), drop(own), drop(INPUT_SLOTS))
    return PartWalk(
        forward=coded(forward),
        output=(OWN_SLOTS,),
        backward=coded(back),
        grad=(OWN_SLOTS if keeps else OWN_SLOTS + 1,),
    )


def job(walk: StepWalk, **fields: object) -> TracedJob:
    plain = TracedJob(
        walk=walk,
        layers="aaaa",
        frozen_layers=0,
        recompute_layers=0,
        pass_tokens=1000,
        passes=1,
        accumulates=False,
        evaluates=False,
        chunk_tokens=0,
        hidden=1,
        vocabulary=1,
        base_bytes=20 * MIB,
        adapter_bytes=20 * MIB,
        state=(),
        attention=((),),
        rows_per_token=(4,),
    )
    return replace(plain, **fields)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def walk_of(whole: PartWalk, recomputed: PartWalk, *experts: TileWalk) -> StepWalk:
    end = PartWalk(forward=coded((STREAM,)), backward=coded((STREAM, drop(OWN_SLOTS))), grad=(OWN_SLOTS + 1,))
    begin = PartWalk(forward=coded((STREAM,)), output=(OWN_SLOTS,))
    return StepWalk(
        sizes=SIZES,
        recomputed=PartWalks(begin=begin, first=recomputed, kinds=(recomputed,), end=end),
        whole=PartWalks(begin=begin, first=whole, kinds=(whole,), end=end),
        experts=experts,
    )


WALK = walk_of(layer(keeps=True), layer(keeps=False))


def reserved_mib(walk: StepWalk = WALK, **fields: object) -> float:
    return reserved_bytes(job(walk, **fields)) / MIB


def test_layers_that_keep_their_activations_reserve_so_much_more_than_those_that_recompute() -> None:
    keeping = [reserved_mib(recompute_layers=layers) for layers in range(5)]
    assert [more - less for more, less in pairwise(keeping[:3])] == [100, 100]
    assert keeping[2] - keeping[4] < 200, "one layer's are there anyway, and holes"


def test_layers_in_front_of_the_first_adapter_keep_nothing_and_have_no_gradients() -> None:
    assert reserved_mib() - reserved_mib(frozen_layers=2) == 2 * (100 + 20)


def test_records_that_go_one_by_one_hold_what_all_of_them_keep() -> None:
    assert reserved_mib(passes=2) - reserved_mib(passes=1) >= 4 * 100 + 5 * 20
    assert reserved_mib(passes=2, recompute_layers=4) - reserved_mib(recompute_layers=4) < 4 * 100


def test_gradients_are_there_once_however_many_micro_batches_they_are_of() -> None:
    assert reserved_mib(accumulates=True, recompute_layers=4) - reserved_mib(recompute_layers=4) + 4 * 40 >= 4 * 40
    assert reserved_mib(accumulates=True, recompute_layers=4) <= reserved_mib(recompute_layers=4) + 4 * 40


def test_what_attention_and_experts_take_by_the_way_is_at_its_place() -> None:
    attending, mixing = (layer(keeps=False, backward=codes) for codes in ((2 * ATTENTION,), MIXING))
    nothing = TileWalk(forward="", backward="")
    forward, backward = (
        TileWalk(forward=coded((HALF, HUGE)), backward=""),
        TileWalk(forward="", backward=coded((HUGE,))),
    )
    found = [
        reserved_mib(walk_of(attending, attending), attention=((size * MIB,),), recompute_layers=4)
        for size in (400, 1000)
    ]
    assert found[1] - found[0] == 600
    found = [reserved_mib(walk_of(mixing, mixing, tile), recompute_layers=4) for tile in (nothing, forward, backward)]
    assert found[1] - found[2] == 60
    assert found[2] - found[0] > 800


def test_cublas_takes_a_workspace_for_each_thread_that_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplying = layer(keeps=False, backward=(2 * PRODUCT, 2 * PRODUCT))
    found: list[float] = []
    for size in (400, 1000):
        monkeypatch.setattr(trainer_facts, "CUBLAS_WORKSPACE_BYTES", size * MIB)
        found.append(reserved_mib(walk_of(multiplying, multiplying), recompute_layers=4))
    assert found[1] - found[0] == 600


def test_a_trace_with_a_walk_is_rehearsed_and_a_share_stands_for_the_holes_of_others() -> None:
    plain = facts("aaaa")
    assert plain.trace is not None
    walked = plain.model_copy(update={"trace": plain.trace.model_copy(update={"walk": WALK.packed()})})
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=4)
    found = [Footprint(make_spec(sequence_length=2048), each, plan) for each in (plain, walked)]
    assert found[0].peak_bytes(4) == found[1].peak_bytes(4), "what is allocated is told by the moments"
    assert found[1].reserved_bytes(4) == reserved_bytes(found[1].rehearsed_trace(4))
    assert found[0].reserved_bytes(4) != found[1].reserved_bytes(4)


def test_a_walk_is_read_as_it_was_packed_and_nothing_else_is() -> None:
    assert StepWalk.unpacked(WALK.packed()) == WALK
    endless = b85encode(zlib.compress(b" " * (MOST_JSON_BYTES + 1))).decode()
    cut = b85encode(zlib.compress(WALK.model_dump_json().encode())[:-1]).decode()
    for text in ("", 'no base 85: "', "0123456789", endless, cut, b85encode(zlib.compress(b"{}")).decode()):
        with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
            StepWalk.unpacked(text)
