"""Linear probes: which variables can be read off the residual stream, at which layer and loop.

Second stop of the way hooks → probes → studies → app. A probe is a ridge classifier; the probes
of all sites are solved together in batched linear algebra and agree with scikit-learn's
RidgeClassifier. A probe is only evidence beside a control task, so accuracy comes with it.

    result = probe_latent(model, noised, latent.values, latent.n_classes, n_loops=8, groups=task.regions())
    result.accuracy.sel(group=3)                                  # (depth,): when is row 3 decodable?
    result.selectivity                                            # accuracy − accuracy on the control task
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.measurement import check_finite, depth_coords, measurement

RIDGE = "ridge regression on one-vs-rest targets ±1 with an intercept; the class of the largest score is predicted"

SOURCE = "arXiv 1909.03368"

N_BOOTSTRAP = 1000
"""Resamples of the held-out examples behind an interval."""


@torch.no_grad()
def ridge_probes(features: Float[Tensor, "site example d_model"], labels: Int[Tensor, "example"], n_classes: int, *,
                 train: Bool[Tensor, "example"], ridge: float = 1.0) -> xr.Dataset:
    """One ridge classifier per site, trained where ``train``, tested elsewhere.

    Over ``site``: ``accuracy`` on the other examples with a 95% Wilson interval (``accuracy_low``,
    ``accuracy_high``, which take examples as independent), ``train_accuracy``, ``majority`` (accuracy of always
    answering the commonest training label); and ``prediction`` (site, example). ``ridge`` is scikit-learn's
    ``alpha``, predictions are those of RidgeClassifier(alpha). Examples labelled −1 are predicted, but neither
    trained on nor scored. Solved in float64.

    Features that are the same in all examples are probed, too: the training labels' commonest class is predicted.

    Raises ValueError for labels beyond ``n_classes``, a ridge not above 0, a side of the split with no example, or
    features that are not finite.
    """
    if features.ndim != 3 or labels.shape != features.shape[1:2] or train.shape != labels.shape:
        raise ValueError("features are [site, example, d_model], labels and train [example]; not "
                         f"{tuple(features.shape)}, {tuple(labels.shape)} and {tuple(train.shape)}.")
    labels, train = labels.to(features.device), train.to(features.device)
    defined = _checked_labels(labels, n_classes)
    tested = defined & ~train
    prediction = _predict(features, labels[:, None], n_classes, defined & train, ridge)[..., 0]
    if not tested.any():
        raise ValueError("every labelled example is in the training set: leave some out to test on.")
    right = prediction == labels
    accuracy = right[:, tested].double().mean(1)
    low, high = _wilson(accuracy, int(tested.sum()))
    majority = (labels[tested] == labels[defined & train].mode().values).double().mean().expand(len(features))
    dims = ("site",)
    named = {"accuracy": (accuracy, "probe accuracy on held-out examples"),
             "accuracy_low": (low, "lower end of the accuracy's 95% interval (Wilson)"),
             "accuracy_high": (high, "upper end of the accuracy's 95% interval (Wilson)"),
             "train_accuracy": (right[:, defined & train].double().mean(1), "probe accuracy on training examples"),
             "majority": (majority, "accuracy of the commonest training label")}
    variables = {name: measurement(value, dims, long_name=long_name, units="1", definition=RIDGE, source=SOURCE)
                 for name, (value, long_name) in named.items()}
    variables["prediction"] = measurement(prediction, ("site", "example"), long_name="predicted class", units="1",
                                          definition=RIDGE, source=SOURCE)
    return xr.Dataset(variables, attrs={"ridge": ridge, "n_train": int((defined & train).sum()),
                                        "n_test": int(tested.sum())})


@torch.no_grad()
def probe_latent(model: LoopedModel, inputs: Inputs, labels: Int[Tensor, "batch pos"],
                 n_classes: int, *, n_loops: int | None = None, groups: Int[Tensor, "pos"],
                 control_types: Int[Tensor, "batch pos"] | None = None, hook: str = "hook_resid_post",
                 test_fraction: float = 0.25, seed: int = 0, ridge: float = 1.0,
                 t: Levels = None) -> xr.Dataset:
    """How well a latent can be read at each depth, in each group of positions; over (depth, group).

    One probe per depth and group, shared by the group's positions. ``labels`` are classes, −1 where the latent is
    undefined; ``groups`` assigns each position to a group, −1 to none. Examples, not positions, are held out.

    ``accuracy`` on held-out examples; ``control_accuracy`` of the same probe on a control task (1909.03368) and
    ``selectivity``, their difference: what is read beyond what the probe could memorise. The control task gives
    every type a random class that is the same in all examples, classes being balanced over the types of a group. A
    word's type is the word; here, since masked positions all hold the same token, **the default type is the position
    itself**, and ``control_types`` gives another. It is NaN in a group of one type, where it is trivial.
    ``majority`` is the accuracy of the commonest training label. ``accuracy_low/high`` and ``selectivity_low/high``
    are 95% percentile intervals over resampled held-out examples, so that positions of one example may depend on
    each other; an accuracy of exactly 1 has an interval of no width. ``n_test`` (group) counts labelled positions
    held out. Features are scaled to unit mean square per site, so that ``ridge`` weighs the same at each depth.

    Raises SiteError for a hook that blocks do not have, ValueError for shapes that do not fit, an empty group, fewer
    examples than both sides of the split need, or states that are not finite.
    """
    if labels.ndim != 2 or len(labels) != model.batch_size(inputs) or groups.shape != labels.shape[1:]:
        raise ValueError(f"labels must be [batch, pos] with {model.batch_size(inputs)} examples and groups [pos], not "
                         f"{tuple(labels.shape)} and {tuple(groups.shape)}.")
    if control_types is not None and control_types.shape != labels.shape:
        raise ValueError(f"control_types must be [batch, pos] = {tuple(labels.shape)}, "
                         f"not {tuple(control_types.shape)}.")
    groups, labels = groups.cpu(), labels.cpu()
    types = torch.arange(labels.shape[1]).expand(labels.shape) if control_types is None else control_types.cpu()
    _checked_labels(labels, n_classes)
    generator = torch.Generator().manual_seed(seed)
    held_out = _held_out(len(labels), test_fraction, generator)
    topology = model.topology(n_loops)
    sites = [topology.site_at(depth, hook) for depth in range(topology.depth)]
    _, rec = model.run_with_cache(inputs, n_loops, names_filter=sites, t=t)
    if rec[sites[0]].shape[:2] != labels.shape:
        raise ValueError(f"labels must be [batch, pos] = {tuple(rec[sites[0]].shape[:2])}, not {tuple(labels.shape)}.")
    weights = _bootstrap_weights(int(held_out.sum()), generator)
    columns: list[dict[str, Tensor]] = []
    numbers = [int(group) for group in groups.unique() if group >= 0]
    for group in numbers:
        positions = (groups == group).nonzero()[:, 0]
        features = torch.stack([rec[site][:, positions.to(rec[site].device)].flatten(2) for site in sites]).cpu()
        control = _control_labels(types[:, positions], n_classes, generator)
        try:
            columns.append(_probe_group(features, labels[:, positions], control, n_classes, held_out, ridge, weights))
        except ValueError as error:
            raise ValueError(f"group {group}: {error}") from None
    coords: dict[Hashable, Any] = {**depth_coords(topology), "group": numbers}
    definition = f"{RIDGE}; {hook} at the group's positions, tested on held-out examples"
    control_of = "a random class per position" if control_types is None else "a random class per type"
    interval = f"; 95% percentile interval over {N_BOOTSTRAP} resamples of held-out examples"
    described = {
        "accuracy": ("probe accuracy", ""), "accuracy_low": ("probe accuracy, lower end", interval),
        "accuracy_high": ("probe accuracy, upper end", interval),
        "control_accuracy": ("probe accuracy on the control task",
                             f"; control task: {control_of}, the same in all examples"),
        "selectivity": ("selectivity", f"; accuracy − control accuracy, control task: {control_of}"),
        "selectivity_low": ("selectivity, lower end", interval),
        "selectivity_high": ("selectivity, upper end", interval),
        "majority": ("accuracy of the commonest label", "; the commonest training label, always"),
    }
    variables = {
        name: measurement(torch.stack([column[name] for column in columns], dim=1), ("depth", "group"),
                          long_name=long_name, units="1", definition=definition + more, source=SOURCE, coords=coords)
        for name, (long_name, more) in described.items()}
    variables["n_test"] = measurement(torch.stack([column["n_test"] for column in columns]), ("group",),
                                      long_name="labelled positions held out", units="1", source=SOURCE,
                                      definition="count over held-out examples", coords={"group": numbers})
    return xr.Dataset(variables, attrs={"n_loops": topology.n_loops, "hook": hook, "ridge": ridge, "seed": seed,
                                        "n_train_examples": int((~held_out).sum()),
                                        "n_test_examples": int(held_out.sum()), "n_classes": n_classes})


# ---------------------------------------------------------------------- private

def _probe_group(features: Float[Tensor, "site batch pos d_model"], labels: Int[Tensor, "batch pos"],
                 control: Int[Tensor, "batch pos"] | None, n_classes: int, held_out: Bool[Tensor, "batch"],
                 ridge: float, weights: Float[Tensor, "resample test"]) -> dict[str, Tensor]:
    """Everything about one group: each [site], and n_test []."""
    n_pos = labels.shape[1]
    defined = labels >= 0
    train = (defined & ~held_out[:, None]).flatten()
    rows = features.flatten(1, 2)
    rms = rows[:, train].double().square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-30)
    tasks = torch.stack([labels, labels if control is None else control], dim=-1).flatten(0, 1)
    prediction = _predict(rows / rms, tasks, n_classes, train, ridge)
    right = (prediction == tasks).view(len(rows), -1, n_pos, 2) & defined[..., None]
    counted = defined[held_out].sum(1).double()                                   # [test]
    if not counted.any():
        raise ValueError("no held-out example has a label here: give more examples, or a larger test_fraction.")
    hits = right[:, held_out].sum(2).double()                                     # [site, test, task]
    if control is None:
        hits[..., 1] = torch.nan
    accuracy, control_accuracy = (hits.sum(1) / counted.sum()).unbind(-1)
    resampled = torch.einsum("rt,stk->srk", weights, hits) / (weights @ counted)[None, :, None]
    low, high = _percentiles(resampled[..., 0])
    selectivity_low, selectivity_high = _percentiles(resampled[..., 0] - resampled[..., 1])
    flat = labels.flatten()
    commonest = flat[train].mode().values
    majority = (labels[held_out] == commonest).sum() / counted.sum()
    return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "control_accuracy": control_accuracy,
            "selectivity": accuracy - control_accuracy, "selectivity_low": selectivity_low,
            "selectivity_high": selectivity_high, "majority": majority.expand(len(rows)),
            "n_test": counted.sum().long()}


def _predict(features: Float[Tensor, "site example d_model"], labels: Int[Tensor, "example task"], n_classes: int,
             train: Bool[Tensor, "example"], ridge: float) -> Int[Tensor, "site example task"]:
    """Ridge classifiers for every site and task at once: one factorisation per site serves all tasks and classes."""
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, not {ridge}: 1e-6 is next to none.")
    if not train.any():
        raise ValueError("no labelled example is in the training set.")
    x = features.double()
    check_finite(x, "features")
    mean = x[:, train].mean(1, keepdim=True)
    fitted = x[:, train] - mean
    wanted = 2.0 * (labels[train][..., None] == torch.arange(n_classes, device=labels.device)).double() - 1
    wanted = wanted.flatten(1)                                                    # [example, task·class]
    intercept = wanted.mean(0)
    gram = fitted.mT @ fitted
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    weight = torch.cholesky_solve(fitted.mT @ (wanted - intercept), torch.linalg.cholesky(gram))
    scores = (x - mean) @ weight + intercept
    return scores.unflatten(-1, (labels.shape[1], n_classes)).argmax(-1)


def _checked_labels(labels: Int[Tensor, "*any"], n_classes: int) -> Bool[Tensor, "*any"]:
    if labels.numel() and (int(labels.max()) >= n_classes or int(labels.min()) < -1):
        raise ValueError(f"labels hold {int(labels.min())}..{int(labels.max())}; with n_classes={n_classes} they are "
                         f"0..{n_classes - 1}, and −1 where undefined.")
    return labels >= 0


def _held_out(n: int, fraction: float, generator: torch.Generator) -> Bool[Tensor, "batch"]:
    n_test = round(n * fraction)
    if not 1 <= n_test < n:
        raise ValueError(f"test_fraction {fraction} of {n} examples leaves {n_test} to test on and {n - n_test} to "
                         "train on: give more examples.")
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[torch.randperm(n, generator=generator)[:n_test]] = True
    return held_out


def _control_labels(types: Int[Tensor, "batch pos"], n_classes: int,
                    generator: torch.Generator) -> Int[Tensor, "batch pos"] | None:
    """A random class per type, as many types in one class as in another; None if there is but one type."""
    _, index = types.unique(return_inverse=True)
    n_types = int(index.max()) + 1
    if n_types == 1:
        return None
    return (torch.randperm(n_types, generator=generator) % n_classes)[index]


def _bootstrap_weights(n: int, generator: torch.Generator) -> Float[Tensor, "resample test"]:
    """How often each of ``n`` examples occurs in each resample."""
    drawn = torch.randint(0, n, (N_BOOTSTRAP, n), generator=generator)
    return torch.zeros(N_BOOTSTRAP, n, dtype=torch.double).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _percentiles(resampled: Float[Tensor, "site resample"]) -> tuple[Float[Tensor, "site"], Float[Tensor, "site"]]:
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype), dim=1)
    return low, high


def _wilson(share: Float[Tensor, "site"], n: int) -> tuple[Float[Tensor, "site"], Float[Tensor, "site"]]:
    """Wilson's 95% interval of a proportion seen in ``n`` independent trials."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)).sqrt()
    return centre - half, centre + half


__all__ = ["probe_latent", "ridge_probes"]
