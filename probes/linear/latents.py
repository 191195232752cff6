"""Which variables can be read off the residual stream, at which layer and loop.

A probe is only evidence beside a control task, so accuracy comes with it.

    result = probe_latent(model, noised, latent.values, latent.n_classes, n_loops=8, groups=task.regions())
    result.accuracy.sel(group=3)                                  # (depth,): when is row 3 decodable?
    result.selectivity                                            # accuracy − accuracy on the control task
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from hooks.topology import Topology
from probes.linear.estimators import Probe, RegressionProbe, RidgeProbe
from probes.linear.features import Features, examples_sums, site_features
from probes.linear.held_out import N_RESAMPLES, held_out, ratio
from probes.measurement import depth_coords, measurement

SOURCE = "arXiv 1909.03368"

INTERVAL = f"; 95% percentile interval over {N_RESAMPLES} resamples of held-out examples"


@torch.no_grad()
def probe_latent(model: LoopedModel, inputs: Inputs, labels: Int[Tensor, "batch pos"],
                 n_classes: int, *, groups: Int[Tensor, "pos"], n_loops: int | None = None, t: Levels = None,
                 probe: Probe | None = None, control_types: Int[Tensor, "batch pos"] | None = None,
                 hook: str = "hook_resid_post", difference: bool = False, test_fraction: float = 0.25,
                 seed: int = 0) -> xr.Dataset:
    """How well a latent can be read at each depth, in each group of positions; over (depth, group).

    One probe per depth and group, shared by the group's positions. ``labels`` are classes, −1 where the latent is
    undefined; ``groups`` assigns each position to a group, −1 to none. Examples, not positions, are held out.
    ``probe`` is a classifier of `probes.linear`, by default `RidgeProbe(alpha=1, scale=True)`; where it chooses its
    penalty, the positions of one example stay on one side. ``difference`` reads what a loop changed, see
    `site_features`.

    ``accuracy`` on held-out examples; ``control_accuracy`` of the same probe on a control task (1909.03368) and
    ``selectivity``, their difference: what is read beyond what the probe could memorise. The control task gives
    every type a random class that is the same in all examples, classes being balanced over the types of a group. A
    word's type is the word; here, since masked positions all hold the same token, **the default type is the position
    itself**, and ``control_types`` gives another. It is NaN in a group of one type, where it is trivial.
    ``majority`` is the accuracy of the commonest training label. ``accuracy_low/high`` and ``selectivity_low/high``
    are 95% percentile intervals over resampled held-out examples, so that positions of one example may depend on
    each other; an accuracy of exactly 1 has an interval of no width. ``right`` and ``control_right`` (depth, group,
    example) are the shares of each held-out example. ``n_test`` (group) counts labelled positions held out.

    Raises SiteError for a hook that blocks do not have, ValueError for shapes that do not fit, an empty group, fewer
    examples than both sides of the split need, or states that are not finite.
    """
    probe = RidgeProbe(scale=True) if probe is None else probe
    _check(model, inputs, labels, groups, control_types)
    groups, labels = groups.cpu(), labels.cpu()
    if labels.numel() and (int(labels.max()) >= n_classes or int(labels.min()) < -1):
        raise ValueError(f"labels hold {int(labels.min())}..{int(labels.max())}; with n_classes={n_classes} they are "
                         f"0..{n_classes - 1}, and −1 where undefined.")
    types = torch.arange(labels.shape[1]).expand(labels.shape) if control_types is None else control_types.cpu()
    judged = held_out(len(labels), test_fraction, seed)
    generator = torch.Generator().manual_seed(seed)
    features, depths, topology = site_features(model, inputs, n_loops=n_loops, t=t, hook=hook, difference=difference)
    numbers = [int(group) for group in groups.unique() if group >= 0]
    columns = []
    for group in numbers:
        try:
            own = groups == group
            control = _control_labels(types, own, n_classes, generator)
            columns.append(_of_group(probe, features, labels, control, (labels >= 0) & own, judged))
        except ValueError as error:
            raise ValueError(f"group {group}: {error}") from None
    read = f"{probe.definition}; {'change over a loop of ' if difference else ''}{hook} at the group's positions, "\
           "tested on held-out examples"
    control_of = "a random class per position" if control_types is None else "a random class per type"
    task = f"; control task: {control_of}, the same in all examples"
    place, each = ("depth", "group"), ("depth", "group", "example")
    described = {
        "accuracy": ("probe accuracy", "", place), "accuracy_low": ("probe accuracy, lower end", INTERVAL, place),
        "accuracy_high": ("probe accuracy, upper end", INTERVAL, place),
        "control_accuracy": ("probe accuracy on the control task", task, place),
        "selectivity": ("selectivity", f"; accuracy − control accuracy{task}", place),
        "selectivity_low": ("selectivity, lower end", INTERVAL, place),
        "selectivity_high": ("selectivity, upper end", INTERVAL, place),
        "majority": ("accuracy of the commonest label", "; the commonest training label, always", place),
        "right": ("probe accuracy of an example", "", each),
        "control_right": ("probe accuracy of an example on the control task", task, each),
        "n_test": ("labelled positions held out", "; count over held-out examples", ("group",)),
    }
    variables = {name: measurement(np.stack([column[name] for column in columns], min(1, len(dims) - 1)), dims,
                                   long_name=long_name, units="1", definition=read + more, source=SOURCE)
                 for name, (long_name, more, dims) in described.items()}
    coords = {**depth_coords(topology, depths), "group": numbers, "example": judged.nonzero()[:, 0].numpy()}
    return xr.Dataset(variables, coords, _attrs(topology, hook, probe, seed, judged) | {"n_classes": n_classes})


@torch.no_grad()
def probe_values(model: LoopedModel, inputs: Inputs, values: Float[Tensor, "batch pos"], *,
                 groups: Int[Tensor, "pos"] | None = None, n_loops: int | None = None, t: Levels = None,
                 probe: RegressionProbe | None = None, hook: str = "hook_resid_post", difference: bool = False,
                 test_fraction: float = 0.25, seed: int = 0) -> xr.Dataset:
    """How well a real number can be read at each depth, such as the noise level or a count; over (depth, group).

    ``values`` are NaN where undefined; ``groups`` as in `probe_latent`, by default all positions together. ``r2`` on
    held-out examples is 1 − Σ (y − ŷ)² / Σ (y − ȳ)², ȳ the mean of the training points, so that 0 is what a probe
    without features reaches and less is worse; with ``r2_low`` and ``r2_high``, ``square_error`` (depth, group,
    example), and ``control_r2`` of the same probe fitted to the values of other examples, which is not above 0 but
    by chance. ``probe`` is by default `RegressionProbe(alpha=1, scale=True)`.

    Raises as `probe_latent` does, and ValueError for values that are all the same in a group.
    """
    probe = RegressionProbe(scale=True) if probe is None else probe
    groups = torch.zeros(values.shape[-1:], dtype=torch.long) if groups is None else groups
    _check(model, inputs, values, groups)
    groups, values = groups.cpu(), values.cpu().double()
    judged = held_out(len(values), test_fraction, seed)
    features, depths, topology = site_features(model, inputs, n_loops=n_loops, t=t, hook=hook, difference=difference)
    shuffled = values.clone()
    fitted = (~judged).nonzero()[:, 0]
    shuffled[fitted] = values[fitted[torch.randperm(len(fitted), generator=torch.Generator().manual_seed(seed))]]
    numbers = [int(group) for group in groups.unique() if group >= 0]
    columns = []
    for group in numbers:
        own = ~values.isnan() & (groups == group)
        try:
            columns.append(_of_values(probe, features, values, shuffled, own, judged))
        except ValueError as error:
            raise ValueError(f"group {group}: {error}") from None
    read = f"{probe.definition}; 1 − Σ (y − ŷ)² / Σ (y − ȳ)² on held-out examples, ȳ of the training points"
    place = ("depth", "group")
    described = {"r2": ("share of the variance that a probe explains", "1", "", place),
                 "r2_low": ("share explained, lower end", "1", INTERVAL, place),
                 "r2_high": ("share explained, upper end", "1", INTERVAL, place),
                 "control_r2": ("share explained by a probe fitted to other examples' values", "1", "", place),
                 "square_error": ("mean square error of an example", "unit of the value, squared", "",
                                  (*place, "example"))}
    variables = {name: measurement(np.stack([column[name] for column in columns], 1), dims, long_name=long_name,
                                   units=units, definition=read + more, source="coefficient of determination")
                 for name, (long_name, units, more, dims) in described.items()}
    coords = {**depth_coords(topology, depths), "group": numbers, "example": judged.nonzero()[:, 0].numpy()}
    return xr.Dataset(variables, coords, _attrs(topology, hook, probe, seed, judged))


# -------------------------------------------------------------------------------------- private

def _check(model: LoopedModel, inputs: Inputs, labels: Tensor, groups: Tensor, types: Tensor | None = None) -> None:
    if labels.ndim != 2 or len(labels) != model.batch_size(inputs) or groups.shape != labels.shape[1:]:
        raise ValueError(f"labels must be [batch, pos] with {model.batch_size(inputs)} examples and groups [pos], not "
                         f"{tuple(labels.shape)} and {tuple(groups.shape)}.")
    if types is not None and types.shape != labels.shape:
        raise ValueError(f"control_types must be [batch, pos] = {tuple(labels.shape)}, not {tuple(types.shape)}.")
    if not bool((groups >= 0).any()):
        raise ValueError("no position is in a group: groups hold −1 only.")


def _attrs(topology: Topology, hook: str, probe: Probe, seed: int, judged: Tensor) -> dict[str, Any]:
    return {"n_loops": topology.n_loops, "hook": hook, "probe": str(probe), "seed": seed,
            "n_train_examples": int((~judged).sum()), "n_test_examples": int(judged.sum())}


def _of_group(probe: Probe, features: Features, labels: Int[Tensor, "batch pos"],
              control: Int[Tensor, "batch pos"] | None, where: Bool[Tensor, "batch pos"],
              judged: Bool[Tensor, "batch"]) -> dict[str, np.ndarray]:
    """Everything about one group."""
    fit, test, counted = features.sides(where, judged)
    nothing = np.full((len(counted), len(features)), np.nan)
    hits = [nothing if wanted is None else examples_sums(
        probe.fit_sites(fit, wanted[fit.where], fit.example).predict(test) == wanted[test.where].numpy(), where[judged])
        for wanted in (labels, control)]
    accuracy, difference = ratio(hits[0], counted[:, None]), ratio(hits[0] - hits[1], counted[:, None])
    control_accuracy = ratio(hits[1], counted[:, None]).value
    commonest = labels[fit.where].mode().values
    majority = float((labels[test.where] == commonest).double().mean())
    with np.errstate(invalid="ignore"):
        shares = [(hit / counted[:, None]).T for hit in hits]
    return {"accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
            "control_accuracy": control_accuracy, "selectivity": difference.value,
            "selectivity_low": difference.low, "selectivity_high": difference.high,
            "majority": np.full(len(features), majority), "right": shares[0], "control_right": shares[1],
            "n_test": np.array(int(counted.sum()))}


def _of_values(probe: RegressionProbe, features: Features, values: Float[Tensor, "batch pos"],
               shuffled: Float[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"],
               judged: Bool[Tensor, "batch"]) -> dict[str, np.ndarray]:
    fit, test, counted = features.sides(where, judged)
    truth, mean = values[test.where].numpy(), float(values[fit.where].mean())
    if float(values[fit.where].std(correction=0)) == 0:
        raise ValueError("all values are the same: there is nothing to read.")
    around = examples_sums((truth - mean)[None] ** 2, where[judged])
    errors = []
    for wanted in (values, shuffled):
        known = fit.where & ~wanted.isnan()
        probes = probe.fit_sites(fit.at(known), wanted[known], known.nonzero()[:, 0])
        errors.append(examples_sums((probes.predict(test) - truth) ** 2, where[judged]))
    error, control = errors
    unexplained = ratio(error, around)
    with np.errstate(invalid="ignore"):
        each = (error / counted[:, None]).T
    return {"r2": 1 - unexplained.value, "r2_low": 1 - unexplained.high, "r2_high": 1 - unexplained.low,
            "control_r2": 1 - ratio(control, around).value, "square_error": each}


def _control_labels(types: Int[Tensor, "batch pos"], own: Bool[Tensor, "pos"], n_classes: int,
                    generator: torch.Generator) -> Int[Tensor, "batch pos"] | None:
    """A random class per type of a group, as many types in one class as in another; None if there is but one type."""
    kinds, index = types[:, own].unique(return_inverse=True)
    if len(kinds) == 1:
        return None
    control = torch.full_like(types, -1)
    control[:, own] = (torch.randperm(len(kinds), generator=generator) % n_classes)[index]
    return control
