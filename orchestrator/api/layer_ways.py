"""Which of a plan's layers recompute, which have what they keep in host memory, and which keep it on the card.

Those with activations in host memory lie evenly among all but the last, whose backward pass comes at once: the link is
busy for as long as the card is. Of the others the first ones recompute, so that what the last ones keep is there no
longer than it has to be. The trainer computes layers so, and `sizing` counts them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class LayerWays:
    """The ways of so many layers."""

    layers: int
    recompute_layers: int
    offloaded_layers: int

    @classmethod
    def of(cls, layers: int, recompute_layers: int, offloaded_layers: int) -> LayerWays:
        """Those of a plan, which may ask for more than there are: what recomputes comes first."""
        recomputing = min(recompute_layers, layers)
        return cls(
            layers=layers,
            recompute_layers=recomputing,
            offloaded_layers=max(0, min(offloaded_layers, layers - 1 - recomputing)),
        )

    def offloaded_below(self, number: int) -> int:
        """How many layers below one are offloaded."""
        others = self.layers - 1
        return min(number, others) * self.offloaded_layers // others if others else 0

    def recomputing_below(self, number: int) -> int:
        """How many layers below one recompute."""
        return min(self.recompute_layers, number - self.offloaded_below(number))

    def is_offloaded(self, number: int) -> bool:
        """Whether what a layer keeps waits in host memory."""
        return self.offloaded_below(number + 1) > self.offloaded_below(number)

    def recomputes(self, number: int) -> bool:
        """Whether a layer computes again what its backward pass needs."""
        return self.recomputing_below(number + 1) > self.recomputing_below(number)

    @cached_property
    def offloaded(self) -> tuple[int, ...]:
        """The numbers of the offloaded layers."""
        others, count = self.layers - 1, self.offloaded_layers
        # The first number with `place` offloaded ones up to it.
        return tuple(-(-place * others // count) - 1 for place in range(1, count + 1))

    @cached_property
    def turn(self) -> int:
        """The layer until whose end the last offloaded layer's activations may take to leave, and at whose backward
        pass they begin to come back: as far above that as offloaded layers are apart."""
        apart = -(-(self.layers - 1) // self.offloaded_layers)
        return min(self.layers - 1, self.offloaded[-1] + apart)

    def fetched_at(self, number: int) -> int | None:
        """The offloaded layer whose activations begin to come back when the backward pass of this one begins."""
        if not self.offloaded_layers:
            return None
        if number == self.turn:
            return self.offloaded[-1]
        place = self.offloaded_below(number)
        return self.offloaded[place - 1] if place and self.is_offloaded(number) else None

    def has_neighbour(self, number: int) -> bool:
        """Whether activations of another layer are on their way while this one computes, in either pass."""
        return self.offloaded_layers > 0 and self.offloaded[0] < number <= self.turn
