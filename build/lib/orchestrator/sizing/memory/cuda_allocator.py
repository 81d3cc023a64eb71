"""PyTorch's caching allocator with expandable segments, as far as it decides how many bytes are reserved.

The rules are those of c10/cuda/CUDACachingAllocator.cpp: blocks of up to 1 MiB come from pages of 2 MiB and larger ones
from pages of 20 MiB; a request takes the smallest free block that it fits, but the block at the growing end last; what
is left of a block stays free, and free neighbors become one. A page once mapped stays, until `give_back_pages`
(torch.cuda.empty_cache) unmaps those that hold nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from orchestrator.sizing.memory.timeline import allocated

LARGEST_SMALL = 1 << 20
SMALL_PAGE, LARGE_PAGE = 2 << 20, 20 << 20
ADDRESS_SPACE = LARGE_PAGE << 24
"""More than any card has."""


class Block:
    """A piece of a segment: handed out, free, or not backed by pages."""

    __slots__ = ("before", "behind", "free", "mapped", "segment", "size", "start")

    def __init__(self, segment: Segment, start: int, size: int, *, mapped: bool) -> None:
        self.segment = segment
        self.start = start
        self.size = size
        self.mapped = mapped
        self.free = True
        self.before: Block | None = None
        self.behind: Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        """What free blocks are ordered by."""
        return self.size, self.start

    @property
    def room(self) -> int:
        """What it can grow to."""
        behind = self.behind
        return self.size + (behind.size if behind is not None and not behind.mapped else 0)


class Segment:
    """The addresses of one pool of one stream."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._free: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}
        self._unmapped: list[int] = [0]
        self._blocks[0] = Block(self, 0, ADDRESS_SPACE, mapped=False)
        self.reserved_bytes = 0

    def take(self, size: int) -> Block:
        """A block of exactly this size."""
        block = self._best_fit(size) or self._grown(size)
        self._remove(block)
        if block.size > size:
            self._insert(self._split(block, size))
        block.free = False
        return block

    def drop(self, block: Block) -> None:
        """The block is free."""
        block.free = True
        self._insert(self._merged(block))

    def give_back_pages(self) -> None:
        """Unmap every page that is wholly free."""
        for _, start in list(self._free):
            block = self._blocks[start]
            first = -(-block.start // self._page_bytes) * self._page_bytes
            last = (block.start + block.size) // self._page_bytes * self._page_bytes
            if first >= last:
                continue
            self._remove(block)
            if block.start < first:
                whole, block = block, self._split(block, first - block.start)
                self._insert(whole)
            if block.size > last - first:
                self._insert(self._split(block, last - first))
            self.reserved_bytes -= block.size
            block.mapped = False
            self._insert(self._merged(block))

    def _best_fit(self, size: int) -> Block | None:
        index = bisect_left(self._free, (size, -1))
        if index == len(self._free):
            return None
        block = self._blocks[self._free[index][1]]
        for _, start in self._free[index + 1 :]:
            larger = self._blocks[start]
            if larger.room >= block.room:
                break
            block = larger
        return block

    def _grown(self, size: int) -> Block:
        """The lowest place where pages can be added to make such a block."""
        for start in self._unmapped:
            block = self._blocks[start]
            if block.before is not None and block.before.free:
                block = block.before
            room, last = 0, block
            while last is not None and last.free and room < size:
                room += last.size
                last = last.behind
            if room >= size:
                return self._mapped(block, size)
        raise AssertionError("the address space is larger than any card")

    def _mapped(self, block: Block, size: int) -> Block:
        while not block.mapped or block.size < size:
            unmapped = block if not block.mapped else block.behind
            assert unmapped is not None, "there is room for it"
            missing = size - (block.size if block.mapped else 0)
            grown = min(-(-missing // self._page_bytes) * self._page_bytes, unmapped.size)
            self._remove(unmapped)
            if grown < unmapped.size:
                self._insert(self._split(unmapped, grown))
            unmapped.mapped = True
            self.reserved_bytes += grown
            block = self._merged(unmapped)
            self._insert(block)
        return block

    def _split(self, block: Block, size: int) -> Block:
        """Cut a block that is in no list; the rest is its neighbor."""
        rest = Block(self, block.start + size, block.size - size, mapped=block.mapped)
        rest.before, rest.behind = block, block.behind
        if rest.behind is not None:
            rest.behind.before = rest
        block.behind, block.size = rest, size
        self._blocks[rest.start] = rest
        return rest

    def _merged(self, block: Block) -> Block:
        """The block with its free neighbors of the same kind."""
        before, behind = block.before, block.behind
        if behind is not None and behind.free and behind.mapped == block.mapped:
            self._remove(behind)
            self._join(block, behind)
        if before is not None and before.free and before.mapped == block.mapped:
            self._remove(before)
            self._join(before, block)
            return before
        return block

    def _join(self, block: Block, behind: Block) -> None:
        del self._blocks[behind.start]
        block.size += behind.size
        block.behind = behind.behind
        if block.behind is not None:
            block.behind.before = block

    def _insert(self, block: Block) -> None:
        if block.mapped:
            insort(self._free, block.key)
        else:
            insort(self._unmapped, block.start)

    def _remove(self, block: Block) -> None:
        if block.mapped:
            del self._free[bisect_left(self._free, block.key)]
        else:
            self._unmapped.remove(block.start)


class Pool:
    """What one stream allocates from."""

    def __init__(self) -> None:
        self._small, self._large = Segment(SMALL_PAGE), Segment(LARGE_PAGE)

    @property
    def reserved_bytes(self) -> int:
        """All mapped pages."""
        return self._small.reserved_bytes + self._large.reserved_bytes

    def take(self, size_bytes: float) -> Block:
        """Memory for a tensor."""
        size = allocated(size_bytes)
        return (self._small if size <= LARGEST_SMALL else self._large).take(size)

    def drop(self, block: Block) -> None:
        """The tensor is gone."""
        block.segment.drop(block)

    def give_back_pages(self) -> None:
        """Unmap every page that is wholly free."""
        self._small.give_back_pages()
        self._large.give_back_pages()
