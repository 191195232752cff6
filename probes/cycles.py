"""Cycles: a stretch of an unrolled network read as loops × layers, and the maps that it is made of.

A looped model's own loops are one; the mid layers of an unlooped model, cut into **pseudo-loops**, are another. An
analysis that takes a cycle treats both alike.

    cycle = own_loops(model.topology(8))
    cycle.maps("loop")                                        # [(1, 3), (3, 5), …]: from depth, up to depth
    cycle = pseudo_loops(deep_twin.topology(1), n_layers=2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hooks import Topology

Maps = Literal["loop", "layer"]
"""What is exchanged: whole loops, or single layers."""


@dataclass(frozen=True)
class Cycle:
    """A stretch of an unrolled network read as loops × layers: ``depths[k][l]`` are unrolled depths."""

    topology: Topology
    depths: tuple[tuple[int, ...], ...]

    @property
    def n_loops(self) -> int:
        return len(self.depths)

    @property
    def n_layers(self) -> int:
        return len(self.depths[0])

    @property
    def stop(self) -> int:
        """The depth after the last loop."""
        return self.depths[-1][-1] + 1

    def sites(self, hook: str) -> list[str]:
        """The sites of ``hook``, loop by loop, layer by layer."""
        return [self.topology.site_at(depth, hook) for loop in self.depths for depth in loop]

    def maps(self, kind: Maps) -> list[tuple[int, int]]:
        """(first depth, depth after the last) of each map, in the order in which they run."""
        if kind not in get_args(Maps):
            raise ValueError(f"maps must be one of {', '.join(get_args(Maps))}, not {kind!r}.")
        if kind == "loop":
            return [(loop[0], loop[-1] + 1) for loop in self.depths]
        return [(depth, depth + 1) for loop in self.depths for depth in loop]

    def labels(self, kind: Maps) -> list[tuple[int, int]]:
        """(loop, layer in the loop) of each map; layer −1 stands for a whole loop."""
        if kind == "loop":
            return [(k, -1) for k in range(self.n_loops)]
        return [(k, layer) for k in range(self.n_loops) for layer in range(self.n_layers)]


def own_loops(topology: Topology) -> Cycle:
    """The loops of a looped model, as they run."""
    return Cycle(topology, tuple(topology.loop_depths()))


def pseudo_loops(topology: Topology, n_layers: int, *, offset: int = 0) -> Cycle:
    """The mid layers of an unlooped model cut into pseudo-loops of ``n_layers``, after skipping ``offset``.

    Layers left over at the end are dropped. Raises ValueError if fewer than two pseudo-loops fit.
    """
    n_loops = (topology.n_mid - offset) // n_layers
    if n_loops < 2:
        raise ValueError(f"{topology.n_mid} mid layers after {offset} give {n_loops} pseudo-loops of {n_layers}; "
                         "the control needs at least two.")
    start = topology.n_head + offset
    return Cycle(topology, tuple(tuple(range(start + k * n_layers, start + (k + 1) * n_layers))
                                 for k in range(n_loops)))
