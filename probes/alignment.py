"""Aligned τ: could another loop have done this loop's work, were it written in the right basis? Ours.

A low τ says *not exchangeable as it stands*: the same operation in a basis that turns from place to place has one too.
So each place k gets one map into a shared basis, x ↦ Q_kᵀ (h − b_k) / s_k with Q_k orthogonal, and every exchange goes
through these maps: content of k is written at j, worked on by f_j, and what enters place j + 1 is written at k + 1. The
maps are **tied**: the map of a place serves it as input and as output. They are fitted on one half of the examples to
make exchanges succeed and judged on the other half. An orthogonal map with a shift cannot do the work of an operation
that is not linear; what it can do, the skip in the same frame does as well, which τ is measured against.

    frame = align(Trajectory.of(model, inputs, cycle), fit=torch.arange(32))
    found = exchange(model, inputs, cycle, frame=frame)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.exchange import Trajectory


@dataclass(frozen=True)
class Aligned:
    """One map per place into a shared basis; a frame for `probes.exchange`."""

    turns: Float[Tensor, "place d_model d_model"]
    shifts: Float[Tensor, "place group d_model"]
    scales: Float[Tensor, "place"]
    groups: Int[Tensor, "example pos"]

    def carry(self, state: Tensor, source: int, to: int, rows: Int[Tensor, "row"]) -> Tensor:
        group = self.groups[rows]
        shared = (state - self.shifts[source][group]) @ self.turns[source] / self.scales[source]
        return self.shifts[to][group] + self.scales[to] * shared @ self.turns[to].T

    def carry_back(self, z: Tensor, k: int, j: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self.carry(z, j + 1, k + 1, rows)


def align(run: Trajectory, *, fit: Int[Tensor, "row"], groups: Int[Tensor, "example pos"],
          places: list[int] | None = None, seed: int = 0) -> Aligned:
    width, n = run.states[0].shape[-1], run.n_places + 1
    n_groups = int(groups.max()) + 1
    shifts, scales = torch.zeros(n, n_groups, width), torch.ones(n)
    for p, state in enumerate(run.states):
        for g in range(n_groups):
            shifts[p, g] = state[fit][groups[fit] == g].mean(0)
        scales[p] = (state[fit] - shifts[p][groups[fit]]).square().mean().sqrt()
    return Aligned(torch.eye(width).expand(n, -1, -1), shifts, scales, groups)
