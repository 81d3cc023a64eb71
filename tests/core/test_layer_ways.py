"""Which layers of a plan recompute, are offloaded, or stay: the closed forms against a count of them all."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.api.layer_ways import LayerWays

COUNTS = st.integers(0, 130)


@given(layers=st.integers(1, 126), recompute_layers=COUNTS, offloaded_layers=COUNTS)
def test_the_ways_of_layers_are_what_a_plan_asks_for(layers: int, recompute_layers: int, offloaded_layers: int) -> None:
    ways = LayerWays.of(layers, recompute_layers, offloaded_layers)
    offloaded = [number for number in range(layers) if ways.is_offloaded(number)]
    recomputing = [number for number in range(layers) if ways.recomputes(number)]
    assert list(ways.offloaded) == offloaded
    assert len(recomputing) == min(recompute_layers, layers)
    assert len(offloaded) == max(0, min(offloaded_layers, layers - 1 - len(recomputing)))
    others = [number for number in range(layers) if number not in offloaded]
    assert recomputing == others[: len(recomputing)]
    assert not offloaded or layers - 1 not in {*offloaded, *recomputing}
    gaps = [after - before for before, after in pairwise([-1, *offloaded])]
    assert not gaps or max(gaps) - min(gaps) <= 1
    for number in range(layers + 1):
        assert ways.offloaded_below(number) == sum(each < number for each in offloaded)
        assert ways.recomputing_below(number) == sum(each < number for each in recomputing)


@given(layers=st.integers(2, 126), recompute_layers=COUNTS, offloaded_layers=st.integers(1, 130))
def test_what_is_offloaded_comes_back_once_and_in_time(
    layers: int, recompute_layers: int, offloaded_layers: int
) -> None:
    ways = LayerWays.of(layers, recompute_layers, offloaded_layers)
    assume(ways.offloaded_layers)
    fetched = [ways.fetched_at(number) for number in reversed(range(layers))]
    assert [each for each in fetched if each is not None] == [*reversed(ways.offloaded)]
    on_the_way: int | None = None
    for number in reversed(range(layers)):
        assert ways.has_neighbour(number) == (on_the_way is not None or ways.fetched_at(number) is not None) or (
            number == on_the_way and ways.fetched_at(number) is None
        )
        if number == on_the_way:
            on_the_way = None
        if (begun := ways.fetched_at(number)) is not None:
            assert on_the_way is None
            assert begun < number
            on_the_way = begun
    assert on_the_way is None
