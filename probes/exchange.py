"""Exchange of operations, τ: could another loop have done this loop's work? Ours; no other source.

The maps f_0 … f_(P−1) of an unrolled network are its loops or its single layers; h_k is the state that enters f_k.
The **clock** of place k is the mean μ_k of h_k and its scale s_k (rms of h_k − μ_k) over the examples and positions
of one group; the **content** is c_k = (h_k − μ_k) / s_k, and [c]_j = μ_j + s_j c puts it on the clock of place j.

- *clean*: the run goes on as it is;
- *skip(k)*: it goes on from place k + 1 with [c_k]_(k+1): the clock moves on and the content does not;
- *exchange(k, j)*: z = f_j([c_k]_j), recentred and rescaled, goes on from place k + 1 on its clock.

With KL the divergence from the clean answer, recalibrated (`probes.calibration`) and averaged over scored positions,
W_k = KL(skip(k)) is the **work** of place k and **τ(k, j) = 1 − KL(exchange(k, j)) / W_k**: 1 where j does all of k's
work, 0 where it is as good as leaving it out, below 0 where it does something else. τ(k, k) = 1. It depends on the
unrolled function only.

An answer that is unsure lies nearer to the clean one than an answer that is surely wrong, and neither did the work. So
both are recalibrated on the other half of the examples: without that, an exchange that makes the model unsure has τ up
to .8 on codecs whose loops have nothing in common.

Clocks are estimated on other examples than those that they are used on (eight folds), calibrations on the other half.

    found = exchange(model, inputs, own_loops(model.topology(4)))
    tau(found)                                                # [content, operation]
    found.kl, found.work                                      # per example, for intervals
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Context, Inputs, Levels, LoopedModel
from probes.batching import derangement
from probes.calibration import calibrated
from probes.cycles import Cycle, Maps
from probes.measurement import check_finite, mean_by_example, measurement

ClockKind = Literal["role", "position"]
"""Positions of one role share a clock, or each position of each role has its own."""

SOURCE = "ours: exchange of operations"

FOLDS = 8
"""Parts of the examples; the clock of each part is set by the others."""

ROWS = 256
"""Examples that one forward of the continuations may hold."""

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
              ) -> Float[Tensor, "row answer vocab"]:
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
        frame = Clocks.of(run, group_of(checked_roles(roles, where, run), clock))
    order = torch.arange(n) if shuffle is None else derangement(n, shuffle)
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
    """Mean and scale of every place per group of positions, estimated on the folds that an example is not in."""

    def __init__(self, means: Float[Tensor, "fold place group d_model"], scales: Float[Tensor, "fold place group"],
                 groups: Int[Tensor, "example pos"], folds: Int[Tensor, "example"]):
        self.means, self.scales, self.groups, self.folds = means, scales, groups, folds
        self._met: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, run: Trajectory, groups: Int[Tensor, "example pos"]) -> Clocks:
        folds = torch.arange(run.n_examples) % min(FOLDS, run.n_examples)
        found = [_clock(state, groups, folds) for state in run.states]
        means, scales = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return cls(means, scales, groups, folds)

    def meet(self, k: int, operations: Sequence[int], z: Sequence[Float[Tensor, "example pos d_model"]]) -> None:
        """Take the clock of what operations made of the content of place k, from the whole batch."""
        self._met = {(k, j): _clock(made, self.groups, self.folds) for j, made in zip(operations, z, strict=True)}

    def carry(self, state: Tensor, source: int, to: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self.moved(state, (self.means[:, source], self.scales[:, source]), to, rows)

    def carry_back(self, z: Tensor, k: int, j: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self.moved(z, self._met[k, j], k + 1, rows)

    def moved(self, state: Tensor, source: tuple[Tensor, Tensor], to: int, rows: Int[Tensor, "row"]) -> Tensor:
        """A state of the clock ``source``, (mean [fold, group, d_model], scale [fold, group]), on that of a place."""
        fold = self.folds[rows].to(state.device)[:, None]
        group = self.groups[rows].to(state.device)
        mean, scale = source[0][fold, group], source[1][fold, group]
        ratio = torch.where(scale > 0, self.scales[:, to][fold, group] / scale.clamp_min(TINY), 0.0)
        return self.means[:, to][fold, group] + ratio[..., None] * (state - mean)


TINY = 1e-30


def _clock(state: Float[Tensor, "example pos d_model"], groups: Int[Tensor, "example pos"],
           folds: Int[Tensor, "example"]) -> tuple[Float[Tensor, "fold group d_model"], Float[Tensor, "fold group"]]:
    """Mean and scale of each group in all folds but one; a group that they lack takes those of the whole batch."""
    n_groups, n_folds = int(groups.max()) + 1, int(folds.max()) + 1
    flat = state.flatten(0, 1).double()
    width = flat.shape[1]
    around = flat.mean(0)                       # squares are taken around it, so that nothing is lost to rounding
    flat = flat - around
    index = (folds[:, None] * n_groups + groups).flatten().to(state.device)
    number, total, squares = (
        flat.new_zeros(n_folds * n_groups, part.shape[1]).index_add_(0, index, part).view(n_folds, n_groups, -1)
        for part in (torch.ones_like(flat[:, :1]), flat, flat.square().mean(-1, keepdim=True)))
    whole = [part.sum(0) for part in (number, total, squares)]
    number, total, squares = (every - part for every, part in zip(whole, (number, total, squares), strict=True))
    lacking = number < 2
    number, total, squares = (torch.where(lacking, every, part)
                              for every, part in zip(whole, (number, total, squares), strict=True))
    mean = total / number.clamp_min(1)
    variance = squares[..., 0] / number[..., 0].clamp_min(1) - mean.square().mean(-1)
    scale = torch.where(variance > ROUNDING * mean.square().mean(-1), variance.clamp_min(0), 0.0).sqrt()
    return (mean + around).view(n_folds, n_groups, width).to(state.dtype), scale.to(state.dtype)


ROUNDING = 1e-12
"""Variance relative to the squared mean below which a group is constant."""


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
    answered = run.go_on(run.n_places, run.states[-1], torch.arange(run.n_examples))
    check_finite(answered, "the model's answer", ruled_out=True)
    answers = answered.shape[:2]
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
    """Divergence from the clean answer and share of changed answers, when each version enters place k + 1."""
    n, parts = run.n_examples, 1 + len(versions)
    pieces: list[list[Tensor]] = [[] for _ in range(parts)]
    for some in torch.arange(n).split(max(1, rows // parts)):
        together = torch.cat([run.states[k + 1][some], *(version[some] for version in versions)])
        logits = run.go_on(k + 1, together, some.repeat(parts))
        for piece, answer in zip(pieces, logits.chunk(parts), strict=True):
            piece.append(answer[scored[some].to(answer.device)].float())
    clean, *others = (torch.cat(piece) for piece in pieces)
    log_clean = clean.log_softmax(-1)
    wanted = log_clean.exp()
    example = torch.nonzero(scored)[:, 0]
    half = halves_of(n)[example].to(clean.device)
    entropy = -(wanted * log_clean).nan_to_num(0.0).sum(-1)
    same_as_it_is = calibrated(clean, wanted, half) - entropy
    found = np.empty((2, len(versions), n))
    for v, other in enumerate(others):
        divergence = calibrated(other, wanted, half) - entropy - same_as_it_is
        differs = (other.argmax(-1) != clean.argmax(-1)).float()
        for m, value in enumerate((divergence, differs)):
            found[m, v] = mean_by_example(value.cpu(), example, n)
    return found


def _groups(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start:start + size])


def _dataset(kl: np.ndarray, work: np.ndarray, changed: np.ndarray, changed_by_skip: np.ndarray, cycle: Cycle,
             maps: Maps) -> xr.Dataset:
    loop, layer = (np.array(part) for part in zip(*cycle.labels(maps), strict=True))
    coords: dict[Hashable, Any] = {
        "loop": ("content", loop), "layer": ("content", layer),
        "loop_of_operation": ("operation", loop), "layer_of_operation": ("operation", layer)}
    by_place: dict[Hashable, Any] = {name: coords[name] for name in ("loop", "layer")}
    kept = "mean over an example's scored positions"
    return xr.Dataset({
        "kl": measurement(kl, ("content", "operation", "example"), coords=coords, units="nat", source=SOURCE,
                          long_name="divergence after an exchange",
                          definition=f"KL(clean ‖ exchange(k, j)), recalibrated, {kept}"),
        "work": measurement(work, ("content", "example"), coords=by_place, units="nat", source=SOURCE,
                            long_name="work", definition=f"KL(clean ‖ skip(k)), recalibrated, {kept}"),
        "changed": measurement(changed, ("content", "operation", "example"), coords=coords, units="1", source=SOURCE,
                               long_name="answers changed by an exchange",
                               definition="share of scored positions whose most probable answer is not the clean one"),
        "changed_by_skip": measurement(changed_by_skip, ("content", "example"), coords=by_place, units="1",
                                       source=SOURCE, long_name="answers changed by leaving the map out",
                                       definition="share of scored positions whose most probable answer is not the "
                                                  "clean one, under skip(k)"),
    }, attrs={"maps": maps, "source": SOURCE})
