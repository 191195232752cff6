"""Probes away from home: trained at one (loop, layer) and tested at another; and which loop a state is of."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.linear.estimators import LogisticProbe, Probe, RidgeProbe
from probes.linear.features import Features, examples_sums, site_features
from probes.linear.held_out import N_RESAMPLES, held_out, ratio
from probes.measurement import depth_coords, measurement


@torch.no_grad()
def transfer(model: LoopedModel, inputs: Inputs, labels: Int[Tensor, "batch pos"], *, n_loops: int | None = None,
             t: Levels = None, probe: Probe | None = None, hook: str = "hook_resid_post", test_fraction: float = 0.25,
             seed: int = 0) -> xr.Dataset:
    """Accuracy at one depth of the probe that was trained at another; over (trained_depth, depth).

    Where loops keep a variable in the same directions, a probe of one loop reads it in another; where each loop
    writes it elsewhere, the probe falls to chance although the probe trained there does not: compare with the
    diagonal, which is `probe_latent`'s accuracy. ``labels`` are −1 where undefined. ``accuracy`` on held-out examples
    with ``low`` and ``high`` (95%, resampled examples), ``right`` (trained_depth, depth, example), and ``majority``,
    the accuracy of the commonest training label. A probe has an intercept and a scale: a stream that only grows
    between the two depths costs accuracy, too.

    Raises as `probe_latent` does.
    """
    probe = RidgeProbe(scale=True) if probe is None else probe
    if labels.ndim != 2 or len(labels) != model.batch_size(inputs):
        raise ValueError(f"labels must be [batch, pos] with {model.batch_size(inputs)} examples, not "
                         f"{tuple(labels.shape)}.")
    labels = labels.cpu()
    judged = held_out(len(labels), test_fraction, seed)
    features, depths, topology = site_features(model, inputs, n_loops=n_loops, t=t, hook=hook)
    fit, test, counted = features.sides(labels >= 0, judged)
    probes = probe.fit_sites(fit, labels[fit.where], fit.example)
    truth, hits = labels[test.where].numpy(), []
    for x in test:                                                        # one depth's features at a time
        answers = np.stack([probes.answers(site, x) for site in range(len(probes))])
        hits.append(examples_sums(answers == truth, test.where[judged]))              # [example, trained_depth]
    total = np.stack(hits, -1)                                                        # [example, trained_depth, depth]
    accuracy = ratio(total, counted[:, None, None])
    majority = (labels[test.where] == labels[fit.where].mode().values).double().mean()
    definition = f"{probe.definition}; trained on {hook} at trained_depth, tested on it at depth, in held-out examples"
    interval = f"{definition}; 95% percentile interval over {N_RESAMPLES} resamples of held-out examples"
    place = ("trained_depth", "depth")
    with np.errstate(invalid="ignore"):
        right = np.moveaxis(total / counted[:, None, None], 0, -1)
    named = {"accuracy": (accuracy.value, "accuracy of a probe trained elsewhere", definition, place),
             "low": (accuracy.low, "accuracy, lower end", interval, place),
             "high": (accuracy.high, "accuracy, upper end", interval, place),
             "right": (right, "accuracy of an example", definition, (*place, "example")),
             "majority": (majority, "accuracy of the commonest training label", definition, ())}
    variables = {name: measurement(np.asarray(value), dims, long_name=long_name, units="1", definition=text,
                                   source="arXiv 1909.03368; trained and tested at different loops")
                 for name, (value, long_name, text, dims) in named.items()}
    coords = {**depth_coords(topology, depths), "trained_depth": depths, "example": judged.nonzero()[:, 0].numpy()}
    return xr.Dataset(variables, coords, {"n_loops": topology.n_loops, "hook": hook, "probe": str(probe), "seed": seed})


@torch.no_grad()
def probe_loop(model: LoopedModel, inputs: Inputs, *, where: Bool[Tensor, "batch pos"] | None = None,
               n_loops: int | None = None, t: Levels = None, probe: Probe | None = None,
               hook: str = "hook_resid_post", normalised: bool = True, test_fraction: float = 0.25,
               seed: int = 0) -> xr.Dataset:
    """Can the loop be told from a state? Over (layer, loop, told): the share of loop's states taken for those of told.

    One probe per looped layer, whose points are the states after that layer in every loop, at the positions
    ``where`` (by default the scored ones). ``accuracy`` (layer) with ``low`` and ``high``; ``chance`` is 1/n_loops.
    ``normalised`` divides every state by its root mean square, as the layers' own norm does, so that a stream that
    merely grows does not give the loop away. States that have arrived at a fixed point cannot be told apart, and a
    straight line can: this is about what the state says of its loop, not about what the loop computes.

    Raises ValueError for fewer than two loops and as `probe_latent` does.
    """
    probe = LogisticProbe(scale=True) if probe is None else probe
    where = model.scored(inputs).cpu() if where is None else where.cpu()
    features, _, topology = site_features(model, inputs, n_loops=n_loops, t=t, hook=hook)
    loops = topology.loop_depths()
    if len(loops) < 2:
        raise ValueError(f"a loop can be told from another where there are two; {model.name} runs {len(loops)} here.")
    judged = held_out(len(where), test_fraction, seed)
    fit, test, counted = features.sides(where, judged)
    unrolled, told, totals = topology.unrolled(), [], []
    for depths in zip(*loops, strict=True):                               # the depths of one layer
        x, y, example = _stacked(fit, depths, normalised)
        answers = probe.fit_sites([x], y, example).answers(0, _stacked(test, depths, normalised)[0])
        taken = answers.reshape(len(depths), 1, -1) == np.arange(len(depths))[:, None]         # [loop, told, point]
        sums = examples_sums(taken.reshape(-1, taken.shape[-1]), where[judged])
        totals.append(sums.reshape(-1, len(depths), len(depths)).trace(axis1=1, axis2=2))      # [example]
        told.append(sums.sum(0).reshape(len(depths), len(depths)) / counted.sum())
    accuracy = ratio(np.stack(totals, -1), counted[:, None] * len(loops))
    definition = f"{probe.definition}; classes are loops, points the states ({hook}) of held-out examples after one " \
                 f"layer in every loop{', each divided by its root mean square' if normalised else ''}"
    named = {"confusion": (np.stack(told), "share of a loop's states taken for another's", ("layer", "loop", "told")),
             "accuracy": (accuracy.value, "accuracy of telling the loop", ("layer",)),
             "low": (accuracy.low, "accuracy, lower end of the 95% interval", ("layer",)),
             "high": (accuracy.high, "accuracy, upper end of the 95% interval", ("layer",)),
             "chance": (np.array(1 / len(loops)), "accuracy of guessing", ())}
    variables = {name: measurement(value, dims, long_name=long_name, units="1", definition=definition,
                                   source="LoopScope") for name, (value, long_name, dims) in named.items()}
    coords = {"layer": [unrolled[depth][0] for depth in loops[0]], "loop": np.arange(len(loops)),
              "told": np.arange(len(loops))}
    return xr.Dataset(variables, coords, {"n_loops": topology.n_loops, "hook": hook, "probe": str(probe), "seed": seed})


# -------------------------------------------------------------------------------------- private

def _stacked(features: Features, depths: tuple[int, ...], normalised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """States of one layer, loop after loop; the loop and the example of each."""
    states = [features[depth] for depth in depths]
    x = torch.cat(states)
    if normalised:
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    return x, torch.arange(len(depths)).repeat_interleave(len(states[0])), features.example.repeat(len(depths))
