"""(layer, loop) ↔ depth: how a head → mid^S → tail model unrolls, and what its places are called.

A `Topology` describes one run. Its ``depth`` counts layers of the unrolled network; ``unrolled()`` says which
physical layer and which loop stands at each depth, ``loop_depths()`` groups the depths of each loop.

    topology = Topology(n_head=1, n_mid=2, n_tail=1, n_loops=8)
    topology.site_at(3)                                   # "blocks.1.hook_resid_post@1"
    topology.loop_depths()[1]                             # (3, 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerPlace:
    """One layer of the head, of a loop, or of the tail.

    ``layer`` numbers physical layers: where a loop runs one layer twice (nested cycles) two places share it.
    ``at`` is what a site of this place says after the ``@``: "{k}" stands for the loop, "" for no ``@`` at all.
    """

    name: str
    layer: int
    at: str = ""


@dataclass(frozen=True)
class Topology:
    """Which layers are looped, and how often in this run.

    ``n_head``, ``n_mid`` and ``n_tail`` count the places before, in and after the loop. ``places`` names them in
    that order; by default they are ``blocks.0``, ``blocks.1`` … of a LoopMDM. ``aliases`` are pairs of a LoopMDM's
    name of a hook and the model's own: ("hook_resid_post", "hook_out").
    """

    n_head: int
    n_mid: int
    n_tail: int
    n_loops: int
    places: tuple[LayerPlace, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.places and len(self.places) != self.n_layers:
            raise ValueError(f"{self.n_layers} places need as many names, not {len(self.places)}.")

    @property
    def n_layers(self) -> int:
        """Places that have a name: n_head + n_mid + n_tail."""
        return self.n_head + self.n_mid + self.n_tail

    @property
    def depth(self) -> int:
        """Number of layers of the unrolled network, n_head + n_loops · n_mid + n_tail."""
        return self.n_head + self.n_loops * self.n_mid + self.n_tail

    @cached_property
    def looped_layers(self) -> tuple[int, ...]:
        """Physical layers inside the loop, in the order in which they first run."""
        mid = range(self.n_head, self.n_head + self.n_mid)
        return tuple(dict.fromkeys(self._place(i).layer for i in mid))

    def is_looped(self, layer: int) -> bool:
        return layer in self.looped_layers

    def unrolled(self) -> list[tuple[int, int | None]]:
        """(layer, loop) at each depth; loop is None in head and tail."""
        return [(self._place(i).layer, loop) for i, loop in self._order]

    def loop_depths(self) -> list[tuple[int, ...]]:
        """The depths of each loop, in order."""
        return [tuple(range(self.n_head + k * self.n_mid, self.n_head + (k + 1) * self.n_mid))
                for k in range(self.n_loops)]

    def site_at(self, depth: int, hook: str = "hook_resid_post") -> str:
        """The site of ``hook`` at an unrolled depth: ``site_at(3) == "blocks.1.hook_resid_post@1"``."""
        index, loop = self._order[depth]
        place, hook = self._place(index), dict(self.aliases).get(hook, hook)
        at = place.at.format(k=loop)
        return f"{place.name}.{hook}@{at}" if at else f"{place.name}.{hook}"

    # ------------------------------------------------------------------ private

    def _place(self, index: int) -> LayerPlace:
        if self.places:
            return self.places[index]
        return LayerPlace(f"blocks.{index}", index, "{k}" if self.n_head <= index < self.n_head + self.n_mid else "")

    @cached_property
    def _order(self) -> list[tuple[int, int | None]]:
        """(index of the place, loop) at each depth."""
        mid = range(self.n_head, self.n_head + self.n_mid)
        return [*((i, None) for i in range(self.n_head)), *((i, k) for k in range(self.n_loops) for i in mid),
                *((i, None) for i in range(mid.stop, self.n_layers))]
