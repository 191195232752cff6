"""Exchange of operations, τ: could another loop have done this loop's work? Ours; no other source.

The maps f_0 … f_(P−1) of an unrolled network are its loops or its single layers; h_k is the state that enters f_k.
The **clock** of place k is the mean μ_k of h_k and its scale s_k (rms of h_k − μ_k) over the examples and positions
of one group; the **content** is c_k = (h_k − μ_k) / s_k, and [c]_j = μ_j + s_j c puts it on the clock of place j.

- *clean*: the run goes on as it is;
- *skip(k)*: it goes on from place k + 1 with [c_k]_(k+1): the clock moves on and the content does not;
- *exchange(k, j)*: z = f_j([c_k]_j), recentred and rescaled, goes on from place k + 1 on its clock.

With KL the divergence from the clean answer, averaged over scored positions, W_k = KL(skip(k)) is the **work** of
place k and **τ(k, j) = 1 − KL(exchange(k, j)) / W_k**: 1 where j does all of k's work, 0 where it is as good as
leaving it out, below 0 where it does something else. τ(k, k) = 1. It depends on the unrolled function only.

Clocks are estimated on one half of the examples and used on the other, both ways.

    found = exchange(model, inputs, own_loops(model.topology(4)))
    tau(found)                                                # [content, operation]
    found.kl, found.work                                      # per example, for intervals
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Context, Inputs, Levels, LoopedModel
from probes.cycles import Cycle, Maps
from probes.measurement import measurement

ClockKind = Literal["role", "position"]
"""Positions of one role share a clock, or each position of each role has its own."""

SOURCE = "ours: exchange of operations"

ROWS = 256
"""Examples that one forward of the continuations may hold."""

KL_CAP = 1e4
"""Divergence, in nats, of an answer that is not finite; no finite one counts as more."""


@runtime_checkable
class Frame(Protocol):
    """How the content of one place is written at another, for the examples ``rows`` of the batch."""

    def carry(self, state: Float[Tensor, "row pos d_model"], source: int, to: int, rows: Int[Tensor, "row"],
              ) -> Float[Tensor, "row pos d_model"]:
        """A state of place ``source`` as one of place ``to``."""

    def carry_back(self, z: Float[Tensor, "row pos d_model"], k: int, j: int, rows: Int[Tensor, "row"],
                   ) -> Float[Tensor, "row pos d_model"]:
        """What f_j made of the content of place k, as a state that enters place k + 1."""


@dataclass(frozen=True)
class Trajectory:
    """The clean run of a batch: what enters each place, and what is needed to go on from there."""

    model: LoopedModel
    context: Context
    maps: tuple[tuple[int, int], ...]                          # (first depth, depth after the last)
    states: tuple[Float[Tensor, "example pos d_model"], ...]   # one per place, and the state after the last map

    @classmethod
    @torch.no_grad()
    def of(cls, model: LoopedModel, inputs: Inputs, cycle: Cycle, *, maps: Maps = "loop",
           t: Levels = None) -> Trajectory:
        """Run the model up to the end of the cycle. ValueError where a state is not finite."""
        found = tuple(cycle.maps(maps))
        state, context = model.enter(inputs, cycle.topology.n_loops, t=t)
        state = model.walk(state, context, 0, found[0][0])
        states = [state]
        for start, stop in found:
            state = model.walk(state, context, start, stop)
            states.append(state)
        for place, reached in enumerate(states):
            if not bool(torch.isfinite(reached).all()):
                raise ValueError(f"the state that enters place {place} of {len(found)} is not finite: NaN or infinite "
                                 "weights or inputs, or a loop that blows up. Nothing can be exchanged there.")
        return cls(model, context, found, tuple(states))

    @property
    def n_places(self) -> int:
        return len(self.maps)

    @property
    def n_examples(self) -> int:
        return len(self.states[0])

    def operate(self, j: int, state: Float[Tensor, "row pos d_model"], rows: Int[Tensor, "row"],
                ) -> Float[Tensor, "row pos d_model"]:
        """f_j on any states of the examples ``rows``."""
        return self.model.walk(state, self.context.rows(rows), *self.maps[j])

    def go_on(self, k: int, state: Float[Tensor, "row pos d_model"], rows: Int[Tensor, "row"],
              ) -> Float[Tensor, "row pos vocab"]:
        """The answer when ``state`` enters place k (the number of places: what follows the last map)."""
        depth = self.maps[k][0] if k < self.n_places else self.maps[-1][1]
        return self.model.resume(depth, state, self.context.rows(rows))


# ------------------------------------------------------------------------ the statistic

@torch.no_grad()
def exchange(model: LoopedModel, inputs: Inputs, cycle: Cycle, *, maps: Maps = "loop",
             scored: Bool[Tensor, "batch answer"] | None = None, roles: Int[Tensor, "batch pos"] | None = None,
             t: Levels = None, clock: ClockKind = "role", frame: Frame | None = None,
             trajectory: Trajectory | None = None, pairs: Bool[np.ndarray, "content operation"] | None = None,
             shuffle: int | None = None, rows: int = ROWS) -> xr.Dataset:
    """Every exchange of a cycle, per example.

    ``kl`` [content, operation, example] and ``work`` [content, example] in nats, both means over an example's scored
    positions (NaN for an example without one); ``changed`` and ``changed_by_skip``, the share of scored positions
    whose most probable answer differs from the clean one.

    ``scored`` are the positions whose answers count, by default the model's own rule. ``roles`` [batch, pos] number
    the roles whose clocks are kept apart, by default scored and not scored. ``clock`` keeps one clock per role or
    per role and position. ``frame`` replaces the clocks, as `probes.alignment` does. ``pairs`` restricts which
    (content, operation) are measured, and the work to contents that are in one; the others are NaN. ``shuffle``, a
    seed, gives every exchange and every skip the content of another example: a control for which τ is about 0 or
    below. ``rows`` bounds the examples of a forward.

    Raises ValueError for fewer than two examples, shapes that do not fit, or states that are not finite.
    """
    run = trajectory or Trajectory.of(model, inputs, cycle, maps=maps, t=t)
    n, n_places = run.n_examples, run.n_places
    where = checked_scored(model, inputs, run, scored)
    if frame is None:
        frame = Clocks.of(run, group_of(checked_roles(roles, where, run), clock), halves_of(n))
    order = torch.arange(n) if shuffle is None else _derangement(n, shuffle)
    kl = np.full((n_places, n_places, n), np.nan)
    changed = kl.copy()
    work, changed_by_skip = np.full((n_places, n), np.nan), np.full((n_places, n), np.nan)
    every = torch.arange(n)
    for k in range(n_places):
        wanted = [j for j in range(n_places) if pairs is None or pairs[k, j]]
        if not wanted:
            continue
        content = run.states[k][order]
        work[k], changed_by_skip[k] = _judge(run, k, [frame.carry(content, k, k + 1, every)], where, rows)[:, 0]
        for some in _groups(wanted, max(1, rows // n)):
            z = [_walked(run, j, frame.carry(content, k, j, every), rows) for j in some]
            if isinstance(frame, Clocks):
                frame.meet(k, some, z)
            back = [frame.carry_back(made, k, j, every) for j, made in zip(some, z, strict=True)]
            kl[k, some], changed[k, some] = _judge(run, k, back, where, rows)
    return _dataset(kl, work, changed, changed_by_skip, cycle, maps)


def tau(found: xr.Dataset) -> xr.DataArray:
    """τ(k, j) = 1 − KL(exchange(k, j)) / W_k from means over examples; NaN where the work is 0.

    Dimensions (content, operation): whose content, and whose operation works on it.
    """
    work = found.work.mean("example")
    value = 1 - found.kl.mean("example") / work.where(work > 0)
    value.attrs = {"long_name": "exchange of operations τ", "units": "1", "source": SOURCE,
                   "definition": "τ(k, j) = 1 − KL(exchange(k, j)) / KL(skip(k)), KL from the clean answer, means over "
                                 "scored positions and examples"}
    return value


def halves_of(n: int) -> Bool[Tensor, "example"]:
    """Which examples make the second half: every other one. ValueError for fewer than two."""
    if n < 2:
        raise ValueError(f"an exchange needs at least two examples, one to set the clock and one to judge; there "
                         f"is {n}.")
    return torch.arange(n) % 2 == 1


# ------------------------------------------------------------------------------- clocks

class Clocks:
    """Mean and scale of every place per group of positions, estimated on the other half of the examples."""

    def __init__(self, means: Float[Tensor, "half place group d_model"], scales: Float[Tensor, "half place group"],
                 groups: Int[Tensor, "example pos"], halves: Bool[Tensor, "example"]):
        self.means, self.scales, self.groups, self.halves = means, scales, groups, halves
        self._met: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, run: Trajectory, groups: Int[Tensor, "example pos"], halves: Bool[Tensor, "example"]) -> Clocks:
        found = [_clock(state, groups, halves) for state in run.states]
        means, scales = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return cls(means, scales, groups, halves)

    def meet(self, k: int, operations: Sequence[int], z: Sequence[Float[Tensor, "example pos d_model"]]) -> None:
        """Take the clock of what operations made of the content of place k, from the whole batch."""
        self._met = {(k, j): _clock(made, self.groups, self.halves) for j, made in zip(operations, z, strict=True)}

    def carry(self, state: Tensor, source: int, to: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self._moved(state, (self.means[:, source], self.scales[:, source]), to, rows)

    def carry_back(self, z: Tensor, k: int, j: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self._moved(z, self._met[k, j], k + 1, rows)

    def _moved(self, state: Tensor, source: tuple[Tensor, Tensor], to: int, rows: Int[Tensor, "row"]) -> Tensor:
        other = (~self.halves[rows]).long().to(state.device)[:, None]   # the half that sets these examples' clock
        group = self.groups[rows].to(state.device)
        mean, scale = source[0][other, group], source[1][other, group]
        ratio = torch.where(scale > 0, self.scales[:, to][other, group] / scale.clamp_min(TINY), 0.0)
        return self.means[:, to][other, group] + ratio[..., None] * (state - mean)


TINY = 1e-30


def _clock(state: Float[Tensor, "example pos d_model"], groups: Int[Tensor, "example pos"],
           halves: Bool[Tensor, "example"]) -> tuple[Float[Tensor, "half group d_model"], Float[Tensor, "half group"]]:
    """Mean and scale of each group in each half; a group that a half lacks takes those of the whole batch."""
    n_groups = int(groups.max()) + 1
    flat, width = state.flatten(0, 1), state.shape[-1]
    groups, halves = groups.to(state.device), halves.to(state.device)
    label = groups.flatten()
    half = halves.long()[:, None].expand_as(groups).flatten()
    index = half * n_groups + label
    number = flat.new_zeros(2 * n_groups).index_add_(0, index, torch.ones_like(flat[:, 0]))
    total = flat.new_zeros(2 * n_groups, width).index_add_(0, index, flat)
    number, total = number.view(2, n_groups), total.view(2, n_groups, width)
    lacking = number < 2
    number = torch.where(lacking, number.sum(0), number)
    total = torch.where(lacking[..., None], total.sum(0), total)
    mean = total / number[..., None].clamp_min(1)
    squares = (flat - mean.view(-1, width)[index]).square().mean(-1)
    spread = flat.new_zeros(2 * n_groups).index_add_(0, index, squares).view(2, n_groups)
    spread = torch.where(lacking, spread.sum(0), spread)
    return mean, (spread / number.clamp_min(1)).sqrt()


def group_of(roles: Int[Tensor, "batch pos"], clock: ClockKind) -> Int[Tensor, "batch pos"]:
    """The number of the clock that each position goes by."""
    if clock not in get_args(ClockKind):
        raise ValueError(f"clock must be one of {', '.join(get_args(ClockKind))}, not {clock!r}.")
    numbered = torch.unique(roles, return_inverse=True)[1]
    if clock == "role":
        return numbered
    return numbered * roles.shape[1] + torch.arange(roles.shape[1], device=roles.device)


def checked_roles(roles: Int[Tensor, "batch pos"] | None, scored: Bool[Tensor, "batch answer"], run: Trajectory,
                  ) -> Int[Tensor, "batch pos"]:
    """The role of every position of the states; by default scored (1) and not scored (0), where answers have the
    positions of the states, else one role."""
    shape = run.states[0].shape[:2]
    if roles is None:
        return scored.long() if scored.shape == shape else torch.zeros(shape, dtype=torch.long)
    if roles.shape != shape:
        raise ValueError(f"roles have shape {tuple(roles.shape)}, the states have [batch, pos] = {tuple(shape)}.")
    return roles.long()


def checked_scored(model: LoopedModel, inputs: Inputs, run: Trajectory, scored: Bool[Tensor, "batch answer"] | None,
                   ) -> Bool[Tensor, "batch answer"]:
    """The positions whose answers count; answers may have other positions than states (12 bits in one vector)."""
    where = (model.scored(inputs) if scored is None else scored).bool()
    answers = run.go_on(run.n_places, run.states[-1], torch.arange(run.n_examples)).shape[:2]
    if where.shape != answers:
        raise ValueError(f"scored has shape {tuple(where.shape)}, the model's answers have [batch, pos] = "
                         f"{tuple(answers)}: give a mask of that shape, scored=….")
    if not bool(where.any()):
        raise ValueError("no position is scored: there is no answer that an exchange could change. Give a mask, "
                         "scored=…, or inputs with masked positions.")
    return where


# ------------------------------------------------------------------------------ private

def _walked(run: Trajectory, j: int, states: Float[Tensor, "example pos d_model"], rows: int,
            ) -> Float[Tensor, "example pos d_model"]:
    return torch.cat([run.operate(j, states[some], some) for some in torch.arange(len(states)).split(rows)])


def _judge(run: Trajectory, k: int, versions: Sequence[Float[Tensor, "example pos d_model"]],
           scored: Bool[Tensor, "example answer"], rows: int) -> Float[np.ndarray, "2 version example"]:
    """KL from the clean answer and share of changed answers, when each version of the state enters place k + 1."""
    found = np.empty((2, len(versions), run.n_examples))
    for some in torch.arange(run.n_examples).split(max(1, rows // (1 + len(versions)))):
        together = torch.cat([run.states[k + 1][some], *(version[some] for version in versions)])
        logits = run.go_on(k + 1, together, some.repeat(1 + len(versions)))
        clean, *others = logits.float().log_softmax(-1).chunk(1 + len(versions))
        at = scored[some].to(clean.device)
        on = at.float()
        number = torch.where(at.any(1), on.sum(1), torch.nan)
        for v, other in enumerate(others):
            kl = (clean.exp() * (clean - other)).sum(-1).nan_to_num(KL_CAP, KL_CAP, KL_CAP).clamp(0, KL_CAP)
            differs = (other.argmax(-1) != clean.argmax(-1)).float()
            for m, value in enumerate((kl, differs)):
                found[m, v, some.numpy()] = ((value * on).sum(1) / number).cpu().numpy()
    return found


def _groups(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start:start + size])


def _derangement(n: int, seed: int) -> Int[Tensor, "example"]:
    """A random order in which no example stands in its own place: a cycle through all of them."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved


def _dataset(kl: np.ndarray, work: np.ndarray, changed: np.ndarray, changed_by_skip: np.ndarray, cycle: Cycle,
             maps: Maps) -> xr.Dataset:
    loop, layer = (np.array(part) for part in zip(*cycle.labels(maps), strict=True))
    coords = {"loop": ("content", loop), "layer": ("content", layer),
              "loop_of_operation": ("operation", loop), "layer_of_operation": ("operation", layer)}
    by_place = {name: coords[name] for name in ("loop", "layer")}
    kept = "mean over an example's scored positions"
    return xr.Dataset({
        "kl": measurement(kl, ("content", "operation", "example"), coords=coords, units="nat", source=SOURCE,
                          long_name="divergence after an exchange", definition=f"KL(clean ‖ exchange(k, j)), {kept}"),
        "work": measurement(work, ("content", "example"), coords=by_place, units="nat", source=SOURCE,
                            long_name="work", definition=f"KL(clean ‖ skip(k)), {kept}"),
        "changed": measurement(changed, ("content", "operation", "example"), coords=coords, units="1", source=SOURCE,
                               long_name="answers changed by an exchange",
                               definition="share of scored positions whose most probable answer is not the clean one"),
        "changed_by_skip": measurement(changed_by_skip, ("content", "example"), coords=by_place, units="1",
                                       source=SOURCE, long_name="answers changed by leaving the map out",
                                       definition="share of scored positions whose most probable answer is not the "
                                                  "clean one, under skip(k)"),
    }, attrs={"maps": maps, "source": SOURCE})
