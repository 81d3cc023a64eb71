"""The allocator's rules on paper: which pages are mapped for what comes and goes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sizing.memory.cuda_allocator import LARGE_PAGE, SMALL_PAGE, Block, Pool

MIB = 1 << 20


def places(*blocks: Block) -> list[int]:
    return [block.start // MIB for block in blocks]


def test_tensors_of_up_to_a_mebibyte_share_small_pages_and_larger_ones_share_large_pages() -> None:
    pool = Pool()
    pool.take(MIB)
    pool.take(MIB)
    assert pool.reserved_bytes == SMALL_PAGE
    pool.take(MIB + 1)
    assert pool.reserved_bytes == SMALL_PAGE + LARGE_PAGE
    pool.take(18 * MIB)
    assert pool.reserved_bytes == SMALL_PAGE + LARGE_PAGE
    pool.take(2 * MIB)
    assert pool.reserved_bytes == SMALL_PAGE + 2 * LARGE_PAGE


def test_a_tensor_takes_the_smallest_hole_that_it_fits_and_the_growing_end_last() -> None:
    pool = Pool()
    wide, _, narrow, _ = pool.take(8 * MIB), pool.take(2 * MIB), pool.take(4 * MIB), pool.take(2 * MIB)
    pool.drop(wide)
    pool.drop(narrow)
    assert places(pool.take(3 * MIB), pool.take(3 * MIB), pool.take(2 * MIB)) == [10, 0, 3]


def test_a_hole_that_is_too_small_stays_and_a_page_is_mapped() -> None:
    pool = Pool()
    hole, _ = pool.take(8 * MIB), pool.take(12 * MIB)
    pool.drop(hole)
    assert places(pool.take(9 * MIB)) == [20]
    assert pool.reserved_bytes == 2 * LARGE_PAGE


def test_free_neighbors_become_one_hole() -> None:
    pool = Pool()
    one, other, _ = pool.take(8 * MIB), pool.take(8 * MIB), pool.take(4 * MIB)
    pool.drop(one)
    pool.drop(other)
    assert places(pool.take(16 * MIB)) == [0]
    assert pool.reserved_bytes == LARGE_PAGE


def test_pages_that_hold_nothing_are_given_back_and_their_addresses_are_used_again() -> None:
    pool = Pool()
    large, small = pool.take(70 * MIB), pool.take(5 * MIB)
    pool.drop(large)
    pool.give_back_pages()
    assert pool.reserved_bytes == LARGE_PAGE  # what `small` is in, with the end of `large`
    assert places(pool.take(30 * MIB)) == [0]
    assert pool.reserved_bytes == 3 * LARGE_PAGE
    pool.drop(small)


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(0, 7), st.booleans()), max_size=60))
def test_blocks_never_overlap_and_nothing_stays_reserved_for_nothing(moves: list[tuple[int, int, bool]]) -> None:
    pool = Pool()
    held: list[Block] = []
    for size, victim, gives_back in moves:
        held.append(pool.take(size))
        if victim < len(held):
            pool.drop(held.pop(victim))
        if gives_back:
            pool.give_back_pages()
        for segment in {id(block.segment): block.segment for block in held}.values():
            own = sorted((block for block in held if block.segment is segment), key=lambda block: block.start)
            assert all(one.start + one.size <= other.start for one, other in pairwise(own))
        assert sum(block.size for block in held) <= pool.reserved_bytes
    for block in held:
        pool.drop(block)
    pool.give_back_pages()
    assert pool.reserved_bytes == 0
