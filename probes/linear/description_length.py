"""Online code length: how much data a probe needs before it can say a variable (2003.12298)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.batching import derangement
from probes.linear.estimators import LogisticProbe, SiteProbes
from probes.linear.features import Features, examples_sums, site_features
from probes.linear.held_out import ratio
from probes.linear.targets import Classes
from probes.measurement import depth_coords, measurement

PORTIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.625, 1.0)
"""Shares of the examples after which the probe is fitted anew; a portion that adds no example is left out."""


@torch.no_grad()
def online_code(model: LoopedModel, inputs: Inputs, labels: Int[Tensor, "batch pos"], n_classes: int, *,
                n_loops: int | None = None, t: Levels = None, probe: LogisticProbe | None = None,
                hook: str = "hook_resid_post", portions: Sequence[float] = PORTIONS, seed: int = 0) -> xr.Dataset:
    """Bits that it takes to send the labels of all examples, one portion after another; over (depth,).

    The labels of the first portion are sent at log2 n_classes bits each, those of every next one at −log2 p of a
    probe fitted to all portions before (2003.12298, equation 4). ``code_length`` in bits per label, with ``low`` and
    ``high`` over resampled examples; ``compression`` is log2 n_classes ÷ code_length, so that 1 is a probe that says
    nothing; ``control_code_length`` is that of labels of other examples at the same position; ``bits`` (depth,
    example) are the bits per label of each example. An accuracy can be high and the code long, where the probe needs
    much data.

    ``labels`` are −1 where undefined; ``portions`` grow to 1. A probability counts for no less than
    1e-3 ÷ n_classes: the probe is mixed with the uniform answer at that weight, since a class that was not seen yet
    would otherwise take infinitely many bits. Raises ValueError for portions that do not grow to 1, fewer than two
    portions with examples, labels beyond ``n_classes``, and as `probe_latent` does.
    """
    probe = LogisticProbe(scale=True) if probe is None else probe
    labels, n = labels.cpu(), model.batch_size(inputs)
    if labels.ndim != 2 or len(labels) != n or int(labels.max()) >= n_classes or int(labels.min()) < -1:
        raise ValueError(f"labels must be [batch, pos] with {n} examples, and 0..{n_classes - 1} or −1 where "
                         f"undefined; they are {tuple(labels.shape)} and {int(labels.min())}..{int(labels.max())}.")
    ends = sorted({round(share * n) for share in portions} - {0})
    if list(portions) != sorted(set(portions)) or portions[-1] != 1 or len(ends) < 2:
        raise ValueError(f"portions must grow to 1 and split {n} examples at least once, not {tuple(portions)}.")
    features, depths, topology = site_features(model, inputs, n_loops=n_loops, t=t, hook=hook)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = _shuffled(labels, seed)
    counted = (labels >= 0).sum(1).double().numpy()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(n))                  # when an example is sent
    bits, control = (_sent(probe, features, wanted, n_classes, rank, ends) for wanted in (labels, shuffled))
    uniform = float(np.log2(n_classes))
    length, shuffled_length = ratio(bits, counted[:, None]), ratio(control, counted[:, None])
    definition = f"{probe.definition}; online code over portions that end at {ends} of {n} examples, the first at " \
                 "log2 n_classes bits per label"
    with np.errstate(invalid="ignore", divide="ignore"):
        each = (bits / counted[:, None]).T
    named = {"code_length": (length.value, "bits per label of the online code", "bit", ("depth",)),
             "low": (length.low, "bits per label, lower end of the 95% interval", "bit", ("depth",)),
             "high": (length.high, "bits per label, upper end of the 95% interval", "bit", ("depth",)),
             "compression": (uniform / length.value, "uniform code ÷ online code", "1", ("depth",)),
             "control_code_length": (shuffled_length.value, "bits per label, labels of other examples", "bit",
                                     ("depth",)),
             "bits": (each, "bits per label of an example", "bit", ("depth", "example"))}
    variables = {name: measurement(value, dims, long_name=long_name, units=units, definition=definition,
                                   source="arXiv 2003.12298")
                 for name, (value, long_name, units, dims) in named.items()}
    return xr.Dataset(variables, {**depth_coords(topology, depths), "example": np.arange(n)},
                      {"n_loops": topology.n_loops, "hook": hook, "probe": str(probe), "seed": seed,
                       "uniform": uniform, "n_classes": n_classes})


def _shuffled(labels: Int[Tensor, "batch pos"], seed: int) -> Int[Tensor, "batch pos"]:
    """Labels of other examples at the same position, of those that have one there."""
    shuffled = labels.clone()
    for pos in range(labels.shape[1]):
        labelled = (labels[:, pos] >= 0).nonzero()[:, 0]
        if len(labelled) > 1:
            shuffled[labelled, pos] = labels[labelled[derangement(len(labelled), seed + pos)], pos]
    return shuffled


def _sent(probe: LogisticProbe, features: Features, labels: Int[Tensor, "batch pos"], n_classes: int,
          rank: Int[Tensor, "batch"], ends: list[int]) -> np.ndarray:
    """Bits of each example, [example, depth]."""
    defined = labels >= 0
    total = np.zeros((len(labels), len(features)))
    first = rank < ends[0]
    total[first] = (defined[first].sum(1).double() * np.log2(n_classes)).numpy()[:, None]
    for start, end in pairwise(ends):
        fit, now = defined & (rank < start)[:, None], defined & ((rank >= start) & (rank < end))[:, None]
        if not bool(fit.any()):
            raise ValueError("the first portion has no labelled position: give more examples, or larger portions.")
        if not bool(now.any()):
            continue
        seen = features.at(fit)
        probes = probe.fit_sites(seen, labels[fit], seen.example)
        wanted = labels[now].numpy()
        cost = np.stack([-np.log2(_mixed(probes, site, x, wanted, n_classes))
                         for site, x in enumerate(features.at(now))])
        total += examples_sums(cost, now)
    return total


def _mixed(probes: SiteProbes, site: int, x: Tensor, wanted: np.ndarray, n_classes: int) -> np.ndarray:
    """The probability of each wanted class, mixed with the uniform one."""
    assert isinstance(probes.targets, Classes)
    p = probes.targets.probabilities(probes.columns_at(site, x)).numpy()
    classes = probes.targets.values
    index = np.searchsorted(classes, wanted).clip(max=len(classes) - 1)
    known = classes[index] == wanted
    return (1 - 1e-3) * np.where(known, p[np.arange(len(p)), index], 0.0) + 1e-3 / n_classes
