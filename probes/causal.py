"""Causal effects, place by place: what becomes of the answer when one layer of one loop is changed, or a state patched.

Every layer of every loop is a place of its own, although loops share weights. A change at a depth needs no run from
the start: the state before it is that of the clean run, and all changes at one depth go on together in one batch.

    found = causal_scan(model, noised, targets=tokens, n_loops=4)
    found.nll.sel(effect="skip")                              # [depth, example], nats that the answer gets worse by
    found.nll.mean("example")                                 # [effect, depth]; `probes.over_examples`: intervals

    metric = nll_of(tokens, model.scored(noised))
    get_act_patch_resid_pre(model, noised.roll(1, 0), noised, metric)       # [depth, pos, example], from clean states
    attribution_patch_resid_pre(model, noised.roll(1, 0), noised, metric)   # the same to first order, in one backward

What a loop adds on entry, such as injected input or its own embedding, belongs to its first layer, and a patched run
keeps that of the corrupted one.

**What is an identity by construction.** Leaving out a layer that adds nothing, putting the update of the loop before in
the place of an equal one, and patching a state where clean and corrupted agree: an effect of 0 there is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Context, Inputs, Levels, LoopedModel
from hooks.topology import Topology
from probes.answers import ROWS, Judge, asked, changes, of_versions, places
from probes.batching import derangement
from probes.gradients import differentiable_states
from probes.measurement import check_run, depth_coords, mean_over_positions, measurement

Effect = Literal["skip", "mean", "resample", "repeat", "freeze"]

EFFECTS: Mapping[Effect, tuple[str, str]] = {
    "skip": ("X_post := X_pre: the layer is left out", "2406.19384"),
    "mean": ("the layer adds the mean over examples of what it adds at this position", "2202.05262, mean ablation"),
    "resample": ("the layer adds what it adds for another example", "2301.04709, resample ablation"),
    "repeat": ("the layer runs twice", "2406.19384"),
    "freeze": ("the layer adds what it added one loop before", "ours, after 2604.11791"),
}
"""What is done to a layer at a loop, and where that comes from."""

Metric = Callable[[Float[Tensor, "row pos vocab"], Int[Tensor, "row"]], Float[Tensor, "row"]]
"""A number for each answer, given which example it answers: `logit_of`, `nll_of`, or one's own (differentiable, for
attribution)."""


# --------------------------------------------------------------------------- one layer, changed

@torch.no_grad()
def causal_scan(model: LoopedModel, inputs: Inputs, *, targets: Int[Tensor, "batch pos"] | None = None,
                effects: Sequence[Effect] = get_args(Effect), n_loops: int | None = None, t: Levels = None,
                scored: Bool[Tensor, "batch pos"] | None = None, at: Bool[Tensor, "batch pos"] | None = None,
                seed: int = 0, rows: int = ROWS) -> xr.Dataset:
    """What the answer loses when one layer of one loop is changed, for every (loop, layer).

    Over (effect, depth, example), means over an example's scored positions: ``nll`` [nat], the rise of the NLL of the
    targets; ``kl`` [nat], KL(clean ‖ changed); ``accuracy``, the fall of the share of right answers; ``exact``, 1 where
    all were right and are not any more, −1 the other way round. ``clean_nll`` and so on [example] are those of the run
    as it is. NaN where an effect is not defined: ``freeze`` outside the loops and in loop 0, and examples without a
    scored position.

    ``effects`` are some of `EFFECTS`. ``targets`` [batch, pos] are clean tokens, by default next tokens. ``scored``
    are the positions whose answers count, ``at`` those that are changed (all by default): other positions see the
    change only through attention. ``seed`` chooses the other example of ``resample``. ``rows`` bounds the examples of
    a forward.

    Raises ValueError for unknown effects, masks and targets of another shape, no scored position, fewer than two
    examples for ``mean`` and ``resample``, and states or answers that are not finite.
    """
    if unknown := set(effects) - set(EFFECTS):
        raise ValueError(f"no effects are called {', '.join(sorted(unknown))}; there are {', '.join(EFFECTS)}.")
    with model.exclusive():
        run = model.run(inputs, n_loops, t=t)
        check_run(run)
        states, logits, context = run
        n = len(states[0])
        if n < 2 and {"mean", "resample"} & set(effects):
            raise ValueError("mean and resample take what a layer adds for other examples, and there is one: give "
                             "more, or effects=….")
        judge = Judge(logits, *asked(model, inputs, logits, targets, scored))
        where = places(at, states[0])
        other = derangement(n, seed)
        found = torch.full((len(Judge.MEASURES), len(effects), context.topology.depth, n), torch.nan)
        for depth in range(context.topology.depth):
            defined, changed = [], []
            for e, effect in enumerate(effects):
                altered = _changed(effect, model, states, depth, context, other)
                if altered is not None:
                    defined.append(e)
                    changed.append(torch.where(where, altered, states[depth + 1]))
            if changed:
                found[:, defined, depth] = of_versions(model, depth + 1, torch.stack(changed), context, judge, rows)
        clean = judge(logits, torch.arange(n))
    coords: dict[Hashable, Any] = {"effect": list(effects), **depth_coords(context.topology)}
    definition = "; ".join(f"{effect}: {EFFECTS[effect][0]}" for effect in effects)
    source = "; ".join(dict.fromkeys(EFFECTS[effect][1] for effect in effects))
    return changes(found, clean, ("effect", "depth", "example"), coords, definition, source, context.topology.n_loops)


# ------------------------------------------------------------------------------ states, patched

@torch.no_grad()
def get_act_patch_resid_pre(model: LoopedModel, corrupted: Inputs, clean: Inputs, metric: Metric, *,
                            n_loops: int | None = None, t: Levels = None, rows: int = ROWS) -> xr.DataArray:
    """``metric`` when the clean state is patched into the corrupted run, at each depth and position.

    [depth, pos, example]: the state before the layer at ``depth`` is that of the clean run at one position, and that of
    the corrupted run elsewhere (2202.05262; TransformerLens' function of this name, per loop). Coordinates
    ``clean`` and ``corrupted`` [example] hold the metric of the two runs; (value − corrupted) / (clean − corrupted) is
    the share that is restored. Raises ValueError for inputs of different shapes.
    """
    with model.exclusive():
        here, there, ends, context = _pair(model, corrupted, clean, metric, n_loops, t)
        n_pos = here[0].shape[1]
        values = []
        for depth in range(context.topology.depth):
            versions = here[depth].repeat(n_pos, 1, 1, 1)
            for pos in range(n_pos):
                versions[pos, :, pos] = there[depth][:, pos]
            values.append(of_versions(model, depth, versions, context, _once(metric), rows)[0])
    return _patched(torch.stack(values), ("depth", "pos", "example"), ends, context.topology,
                    "the state before a layer at one position")


@torch.no_grad()
def get_act_patch_loops(model: LoopedModel, corrupted: Inputs, clean: Inputs, metric: Metric, *,
                        n_loops: int | None = None, t: Levels = None, rows: int = ROWS) -> xr.DataArray:
    """``metric`` when the state after a loop of the clean run is put in the place of that after another loop of the
    corrupted run, at all positions.

    [loop, clean_loop, example]: rows are loops of the corrupted run, columns those of the clean one. Off the diagonal
    a state meets a clock that is not its own, see `probes.exchange`. ``clean`` and ``corrupted`` as in
    `get_act_patch_resid_pre`. Raises ValueError where nothing is looped.
    """
    with model.exclusive():
        _, there, ends, context = _pair(model, corrupted, clean, metric, n_loops, t)
        after = [loop[-1] + 1 for loop in context.topology.loop_depths()]
        if not after:
            raise ValueError(f"{model.name} loops no layer.")
        versions = torch.stack([there[depth] for depth in after])
        values = torch.stack([of_versions(model, depth, versions, context, _once(metric), rows)[0] for depth in after])
    found = _patched(values, ("loop", "clean_loop", "example"), ends, None, "the state after a loop")
    return found.assign_coords(loop=range(len(after)), clean_loop=range(len(after)))


def attribution_patch_resid_pre(model: LoopedModel, corrupted: Inputs, clean: Inputs, metric: Metric, *,
                                n_loops: int | None = None, t: Levels = None) -> xr.DataArray:
    """What `get_act_patch_resid_pre` would give, to first order: metric + (clean − corrupted state) · gradient.

    [depth, pos, example], from one backward pass through the corrupted run (2310.10348). How good the approximation is
    depends on the place: compare it with the exact patch where it matters, by `attribution_error`. Raises
    `hooks.Unavailable` where the model's own code runs layers without gradients.
    """
    with model.exclusive(), torch.enable_grad():
        with torch.no_grad():
            _, there, ends, _ = _pair(model, corrupted, clean, metric, n_loops, t)
        states, context = differentiable_states(model, corrupted, n_loops, t=t)
        value = metric(model.read(states[-1], context), torch.arange(len(states[-1])))
        kept = states[:-1]
        gradients = torch.autograd.grad(value.sum(), kept)
    change = torch.stack([((there[depth] - kept[depth].detach()) * gradient).sum(-1)
                          for depth, gradient in enumerate(gradients)])                       # [depth, batch, pos]
    values = value.detach()[:, None] + change
    return _patched(values.transpose(1, 2), ("depth", "pos", "example"), ends, context.topology,
                    "the state before a layer at one position, to first order")


def attribution_error(attributed: xr.DataArray, exact: xr.DataArray) -> xr.DataArray:
    """RMS error of attribution patching at each depth, relative to the RMS effect of the exact patch there."""
    effect = exact - exact.corrupted
    wrong = (((attributed - exact) ** 2).mean(("pos", "example")) / (effect ** 2).mean(("pos", "example"))) ** 0.5
    return measurement(wrong.values, ("depth",), coords={name: exact[name] for name in ("depth", "layer", "loop")},
                       long_name="relative error of attribution patching", units="1", source="2310.10348",
                       definition="rms(attributed − exact) / rms(exact − corrupted), over positions and examples")


@torch.no_grad()
def dose_curve(model: LoopedModel, inputs: Inputs, direction: Float[Tensor, "d_model"], depth: int,
               doses: Sequence[float], metric: Metric, *, at: Bool[Tensor, "batch pos"] | None = None,
               n_loops: int | None = None, t: Levels = None, rows: int = ROWS) -> xr.DataArray:
    """``metric`` when ``dose`` · ``direction`` is added to the state before the layer at ``depth``: [dose, example].

    ``at`` are the positions that are steered, all by default. A dose of 0 is the model's own answer. Compare with
    random directions of the same length: any push of some size changes an answer.
    """
    with model.exclusive():
        states, _, context = model.run(inputs, n_loops, t=t)
        if not 0 <= depth < context.topology.depth:
            raise ValueError(f"depth {depth} is not in a run of {context.topology.depth} layers.")
        if direction.shape != states[0].shape[-1:]:
            raise ValueError(f"the direction has shape {tuple(direction.shape)}, states have d_model = "
                             f"{states[0].shape[-1]}.")
        state, where = states[depth], places(at, states[0])
        pushed = torch.stack([torch.where(where, state + dose * direction.to(state), state) for dose in doses])
        values = of_versions(model, depth, pushed, context, _once(metric), rows)[0]
    return measurement(values, ("dose", "example"), coords={"dose": list(doses)}, long_name="metric under steering",
                       units="1", source="2308.10248", definition="metric of the answer when X := X + dose · direction")


def logit_of(tokens: Int[Tensor, "batch pos"], scored: Bool[Tensor, "batch pos"]) -> Metric:
    """Mean logit of ``tokens`` at an example's scored positions, less the mean logit over the vocabulary there."""
    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        finite = logits.masked_fill(~torch.isfinite(logits) | (logits < -1e4), 0.0)   # a mask that is never predicted
        value = logits.gather(-1, tokens[rows].clamp_min(0)[..., None].to(logits.device))[..., 0] - finite.mean(-1)
        return mean_over_positions(value, scored[rows].to(logits.device))

    return metric


def nll_of(tokens: Int[Tensor, "batch pos"], scored: Bool[Tensor, "batch pos"]) -> Metric:
    """Mean NLL [nat] of ``tokens`` at an example's scored positions."""
    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(-1)
        nll = -log_p.gather(-1, tokens[rows].clamp_min(0)[..., None].to(logits.device))[..., 0]
        return mean_over_positions(nll, scored[rows].to(logits.device))

    return metric


# -------------------------------------------------------------------------------------- private

def _changed(effect: Effect, model: LoopedModel, states: Sequence[Tensor], depth: int, context: Context,
             other: Int[Tensor, "batch"]) -> Float[Tensor, "batch pos d_model"] | None:
    """The state after a layer that was changed, or None where the effect is not defined."""
    before, after = states[depth], states[depth + 1]
    update = after - before
    if effect == "skip":
        return before
    if effect == "mean":
        return before + update.mean(0, keepdim=True)
    if effect == "resample":
        return before + update[other.to(update.device)]
    if effect == "repeat":
        return model.apply(depth, after, context)
    topology = context.topology
    earlier = depth - topology.n_mid
    if topology.unrolled()[depth][1] in (None, 0) or earlier < topology.n_head:
        return None
    return before + states[earlier + 1] - states[earlier]


def _once(metric: Metric) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, rows: metric(logits, rows)[None].cpu()


def _pair(model: LoopedModel, corrupted: Inputs, clean: Inputs, metric: Metric, n_loops: int | None, t: Levels,
          ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, Tensor], Context]:
    """States of both runs, the metric of both, and the context of the corrupted one."""
    here, there = model.run(corrupted, n_loops, t=t), model.run(clean, n_loops, t=t)
    if here.states[0].shape != there.states[0].shape:
        raise ValueError(f"corrupted states are {tuple(here.states[0].shape)}, clean ones "
                         f"{tuple(there.states[0].shape)}: patching needs the same examples and positions.")
    every = torch.arange(len(here.states[0]))
    ends = metric(here.logits, every).cpu(), metric(there.logits, every).cpu()
    if ends[0].shape != every.shape:
        raise ValueError(f"a metric gives a number per example, [{len(every)}], not {tuple(ends[0].shape)}.")
    return here.states, there.states, ends, here.context


def _patched(values: Tensor, dims: tuple[str, ...], ends: tuple[Tensor, Tensor], topology: Topology | None, what: str,
             ) -> xr.DataArray:
    coords: dict[Hashable, Any] = {} if topology is None else dict(depth_coords(topology))
    coords |= {name: ("example", end.numpy()) for name, end in zip(("corrupted", "clean"), ends, strict=True)}
    return measurement(values, dims, coords=coords, long_name="metric after patching", units="1", source="2202.05262",
                       definition=f"metric of the corrupted run with {what} taken from the clean run")
