"""The order in which loops and layers run, as a value that edits can change.

A forward of S loops follows a `Plan`: one `Pass` per loop, each with the layers that it runs
in order. `hooks.edits` skips, repeats and swaps by rewriting the plan; the model itself
is not touched, and without edits it does not look at a plan at all.

    straight(n_loops=2, layers=(1, 2))      # (Pass(0, (1, 2)), Pass(1, (1, 2)))

Sites number the passes that run, in order of time: after repeating loop 2, the second time
is ``@3`` and what was loop 3 is ``@4``. A skipped loop keeps its number, and its sites cannot fire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hooks.hook_points import LoopClock
from hooks.sites import LoopAxes, Site, SiteSpace

At = slice | Tensor | np.ndarray | Sequence[int] | int
"""Positions: a slice, indices (none, if there are none), or booleans [pos] or [batch, pos]."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Some of the positions of a batch, or with ``inverse`` all the others."""

    at: At
    inverse: bool = False

    def mask(self, activation: Tensor, axes: tuple[str, ...]) -> Tensor:
        """Boolean, broadcastable to ``activation``, along its ``pos`` axis (``query`` in attention patterns)."""
        axis = next((i for i, name in enumerate(axes) if name in ("pos", "query")), None)
        if axis is None or activation.ndim != len(axes):
            raise ValueError(f"an edit was limited to some positions, and an activation of shape "
                             f"{tuple(activation.shape)} has no position axis that is known: leave out `at`, "
                             "or give watch axes=.")
        batch, pos = activation.shape[0], activation.shape[axis]
        mask = self._chosen(batch, pos, activation.device)
        shape = [1] * activation.ndim
        shape[0], shape[axis] = mask.shape
        return (mask != self.inverse).view(shape)

    def _chosen(self, batch: int, pos: int, device: torch.device) -> Tensor:
        """Boolean [1 or batch, pos]. Raises ValueError for what does not choose among ``pos`` positions."""
        mask = torch.zeros(1, pos, dtype=torch.bool, device=device)
        if isinstance(self.at, slice):
            mask[:, self.at] = True
            return mask
        at = torch.as_tensor(self.at)
        if at.ndim == 2:
            if at.dtype != torch.bool or at.shape != (batch, pos):
                raise ValueError(f"positions given as two axes must be boolean and [batch, pos], here "
                                 f"{[batch, pos]}, not {at.dtype} {list(at.shape)}.")
            return at.to(device)
        at = at.reshape(-1) if at.ndim < 2 else at
        if not at.numel() and at.dtype != torch.bool:
            return mask
        if at.ndim > 1 or at.is_floating_point() or at.is_complex():
            raise ValueError(f"`at` chooses positions by a slice, whole numbers or booleans, not by {self.at!r}.")
        if at.dtype == torch.bool:
            if len(at) != pos:
                raise ValueError(f"a boolean choice of positions needs one value for each of {pos}, not {len(at)}.")
            return at[None].to(device)
        if int(at.min()) < -pos or int(at.max()) >= pos:
            raise ValueError(f"`at` chooses the positions {at.tolist()}, and this run has {pos}: 0..{pos - 1}.")
        mask[:, at.long().to(device)] = True
        return mask


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass of the mid block.

    ``index`` is the loop that the loop embedding takes it for; without ``layers`` the state is left as it
    is. ``instead`` gives the result of other passes to some positions: those run on the same
    state, unobserved, so that sites show the pass itself.
    """

    index: int
    layers: tuple[int, ...]
    instead: tuple[tuple[Positions, Pass], ...] = ()

    def map_layers(self, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Pass:
        """The same with other layers, in what it does instead as well."""
        return replace(self, layers=change(self.layers) if self.layers else (),
                       instead=tuple((where, other.map_layers(change)) for where, other in self.instead))


Plan = tuple[Pass, ...]
Replan = Callable[[Plan], Plan]


@runtime_checkable
class Loopable(Protocol):
    """What a plan asks of a model: one pass of its mid layers, and the clock that its hook points look at."""

    clock: LoopClock

    def loop(self, x: Tensor, k: int, injected: Tensor, condition: Tensor | None = None, real: Tensor | None = None, *,
             step: Pass | None = None) -> Tensor:
        """The mid layers as ``step`` has them, as loop ``k``."""


def straight(n_loops: int, layers: Sequence[int]) -> Plan:
    """The plan of an unedited forward."""
    return tuple(Pass(k, tuple(layers)) for k in range(n_loops))


def run(model: Loopable, plan: Plan, x: Tensor, injected: Tensor, condition: Tensor | None,
        real: Tensor | None = None) -> Tensor:
    """All passes of ``plan`` on the state ``x`` [batch, pos, d_model]."""
    for k, step in enumerate(plan):
        x = _run_pass(model, step, k, x, injected, condition, real)
    return x


def space_of(plan: Plan, names: dict[str, bool]) -> SiteSpace:
    """The sites that fire under ``plan``; ``names`` says of each hook point whether it is looped."""
    axes: LoopAxes = (("", len(plan)),)
    absent = {Site(name, (k,), ("",)) for k, step in enumerate(plan) for name, looped in names.items()
              if looped and not _fires(name, step)}
    return SiteSpace({name: axes if looped else () for name, looped in names.items()}, absent)


def _fires(name: str, step: Pass) -> bool:
    parts = name.split(".")
    return int(parts[1]) in step.layers if parts[0] == "blocks" else bool(step.layers)


def _run_pass(model: Loopable, step: Pass, k: int, x: Tensor, injected: Tensor, condition: Tensor | None,
              real: Tensor | None) -> Tensor:
    out = model.loop(x, k, injected, condition, real, step=step) if step.layers else x
    for where, other in step.instead:
        muted, model.clock.muted = model.clock.muted, True
        try:
            new = _run_pass(model, other, k, x, injected, condition, real)
        finally:
            model.clock.muted = muted
        out = torch.where(where.mask(out, ("batch", "pos", "d_model")), new, out)
    return out
