"""Parts of a looped layer of which each loop runs its own: attention heads and MLP neurons switched by the loop index.

A `Switched` part holds one module per group and a gate [loop, group]; at loop k it answers with the sum of the groups
that are open there, each times its gate. A gate that is the identity gives each loop a group of its own.

    block.mlp = Switched([rewired(old, block.mlp) for old in others], torch.eye(4), model.clock)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.hook_points import HookPoint, LoopClock


class Switched(nn.Module):
    """Σ_g gate[loop, g] · group_g(…); groups whose gate is 0 do not run.

    The loop is the one that the model's clock shows: under edits that skip, repeat or swap loops, the one that sites
    are named after. Where several groups are open at once (a leak), hook points inside them fire once for each.
    """

    gate: Float[Tensor, "loop group"]

    def __init__(self, groups: Sequence[nn.Module], gate: Float[Tensor, "loop group"], clock: LoopClock):
        super().__init__()
        if gate.shape[1] != len(groups):
            raise ValueError(f"the gate switches {gate.shape[1]} groups, and there are {len(groups)}.")
        self.groups = nn.ModuleList(groups)
        self.register_buffer("gate", gate.clone())
        self.clock = clock

    def forward(self, x: Float[Tensor, "batch pos d_model"], *rest: object) -> Float[Tensor, "batch pos d_model"]:
        loop = self.clock.loop
        if loop >= len(self.gate):
            raise ValueError(f"loop {loop} has no weights of its own: there are those of loops 0 to "
                             f"{len(self.gate) - 1}.")
        total: Tensor | None = None
        for weight, group in zip(self.gate[loop].tolist(), self.groups, strict=True):
            if weight:
                part = group(x, *rest) if weight == 1 else weight * group(x, *rest)
                total = part if total is None else total + part
        return torch.zeros_like(x) if total is None else total


def rewired(part: nn.Module, like: nn.Module) -> nn.Module:
    """A copy of ``part`` that is observed where ``like`` is: it has the hook points of ``like``."""
    points = {name: point for name, point in vars(like).items() if isinstance(point, HookPoint)}
    memo = {id(getattr(part, name)): point for name, point in points.items()}
    return copy.deepcopy(part, memo)


def own_gate(n_loops: int, leak: float = 0.0) -> Float[Tensor, "loop group"]:
    """Each loop opens its own group, and by ``leak`` in [0, 1] all of them alike: (1 − leak) · I + leak / n_loops."""
    if not 0 <= leak <= 1:
        raise ValueError(f"leak is a share, between 0 and 1, not {leak}.")
    return (1 - leak) * torch.eye(n_loops) + leak / n_loops
