"""Loop index: can the loop be told from a state?"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.linear.estimators import LogisticProbe, Probe
from probes.linear.features import Features, examples_sums, site_features
from probes.linear.held_out import held_out, ratio
from probes.measurement import measurement


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
