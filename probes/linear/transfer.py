"""Transfer: a probe trained at one (loop, layer) and tested at another."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.linear.estimators import Probe, RidgeProbe
from probes.linear.features import examples_sums, site_features
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
