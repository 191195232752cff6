"""Linear probes of the catalogue: what they read are the commonest answers, as classes, at scored positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import xarray as xr

from probes import LogisticProbe, online_code, probe_latent, probe_loop, probe_values, site_features, transfer
from probes.causal import dose_curve, logit_of
from studies.questions.catalogue.entries.entry import CatalogueEntry, example_mean, with_interval
from studies.questions.catalogue.entries.setting import Setting

DOSES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Lengths of what is added along a direction, in root mean squares of the states there."""
RANDOM = 4
"""Random directions that steering is compared with."""


def _probed(setting: Setting, difference: bool = False) -> xr.Dataset:
    labels, n_classes = setting.labels
    groups = torch.zeros(labels.shape[1], dtype=torch.long)
    return probe_latent(setting.model, setting.inputs, labels, n_classes, groups=groups, n_loops=setting.n_loops,
                        t=setting.t, difference=difference, seed=setting.seed).isel(group=0, drop=True)


def _accuracy(difference: bool) -> Callable[[Setting], xr.Dataset]:
    def measure(setting: Setting) -> xr.Dataset:
        found = _probed(setting, difference)
        return with_interval(found.accuracy, found.accuracy_low, found.accuracy_high, found.majority)

    return measure


def _selectivity(setting: Setting) -> xr.Dataset:
    found = _probed(setting)
    return with_interval(found.selectivity, found.selectivity_low, found.selectivity_high)


def _noise(setting: Setting) -> xr.Dataset:
    share = setting.scored.float().mean(1, keepdim=True).expand(setting.scored.shape)
    values = torch.where(setting.scored, share, torch.nan)
    found = probe_values(setting.model, setting.inputs, values, n_loops=setting.n_loops, t=setting.t,
                         seed=setting.seed).isel(group=0, drop=True)
    return with_interval(found.r2, found.r2_low, found.r2_high, found.control_r2)


def _transfer(setting: Setting) -> xr.Dataset:
    found = transfer(setting.model, setting.inputs, setting.labels[0], n_loops=setting.n_loops, t=setting.t,
                     seed=setting.seed)
    return with_interval(found.accuracy, found.low, found.high)


def _loop(setting: Setting) -> xr.Dataset:
    found = probe_loop(setting.model, setting.inputs, where=setting.scored, n_loops=setting.n_loops, t=setting.t,
                       seed=setting.seed)
    return with_interval(found.accuracy, found.low, found.high, found.chance)


def _code(setting: Setting) -> xr.Dataset:
    found = online_code(setting.model, setting.inputs, *setting.labels, n_loops=setting.n_loops, t=setting.t,
                        seed=setting.seed)
    return with_interval(found.code_length, found.low, found.high, found.control_code_length)


@torch.no_grad()
def _steering(setting: Setting) -> xr.Dataset:
    """Along a probe's direction for the commonest answer, before the middle one of the looped layers."""
    features, _, topology = site_features(setting.model, setting.inputs, n_loops=setting.n_loops, t=setting.t)
    mid = topology.n_head + topology.n_loops * topology.n_mid // 2
    labels, _ = setting.labels
    common = int(labels[labels >= 0].mode().values)
    of_all = (labels == common).long()
    x = features.at(setting.scored)[mid - 1 if mid else 0]
    probe = LogisticProbe(scale=True).fit(x.numpy(), of_all[setting.scored].numpy())
    towards = torch.as_tensor(probe.direction(), dtype=torch.float32).flatten()
    size = float(x.square().sum(-1).mean().sqrt())
    metric = logit_of(torch.full_like(setting.targets, int(setting.tokens_of_labels[common])), setting.scored)

    def curve(direction: torch.Tensor) -> xr.DataArray:
        doses = [dose * size for dose in DOSES]
        found = dose_curve(setting.model, setting.inputs, direction / direction.norm(), mid, doses, metric,
                           at=setting.scored, n_loops=setting.n_loops, t=setting.t)
        return found.assign_coords(dose=list(DOSES))

    generator = torch.Generator().manual_seed(setting.seed)
    random = [curve(torch.randn(towards.shape, generator=generator)) for _ in range(RANDOM)]
    return example_mean(curve(towards), null=sum(random[1:], random[0]) / RANDOM)


PROBES = (
    CatalogueEntry("latent_probe", "Linear probe", "Linear probes",
        "share of held-out positions at which argmax_c (w_c · X + b_c) is the class", "0 to 1",
        "What can be read off a state linearly: here the answer.",
        "A probe finds what is there, used or not. Classes of unequal size are guessed by their frequency: "
        "compare with the commonest label.", "1610.01644", _accuracy(False), "the commonest training label, always"),
    CatalogueEntry("selectivity", "Selectivity", "Linear probes",
        "accuracy − accuracy on a control task (a random class for each position, the same in all examples)", "−1 to 1",
        "What of a probe's accuracy is not the probe's own memory.",
        "Where positions cannot be told apart by the state, the control task cannot be learned, and "
        "selectivity is high for that reason.", "1909.03368", _selectivity),
    CatalogueEntry("difference_probe", "Probe of what a loop changed", "Linear probes",
        "the linear probe on X_k − X_(k−1), the state after the same layer one loop earlier", "0 to 1",
        "What a loop writes, apart from what stood there before.",
        "Differences of states that settle are small: what a probe with a scale of its own reads in them may "
        "matter to nobody.", "2607.18553", _accuracy(True), "the commonest training label, always", loops=2),
    CatalogueEntry("noise_probe", "Probe of the noise level", "Linear probes",
        "R² = 1 − Σ(y − ŷ)² ÷ Σ(y − ȳ)², y the share of scored positions of an example", "1 and below",
        "Whether a state says how much of the input is masked.",
        "Of held-out examples, so few of them give values below 0, worse than the mean. Untrained models tell"
        " it, too.", "ours", _noise, "the same probe, fitted to the values of other examples"),
    CatalogueEntry("transfer", "Transfer of a probe", "Linear probes",
        "accuracy at one (loop, layer) of the probe that was trained at another", "0 to 1",
        "Whether loops keep a variable in the same directions.",
        "A probe has a threshold and a scale; a stream that only grows costs accuracy. Compare with the diagonal.",
        "probes: 1909.03368; between loops ours", _transfer, matrix=True),
    CatalogueEntry("loop_probe", "Probe of the loop", "Linear probes",
        "accuracy of telling the loop from a state of unit norm, one probe per layer", "0 to 1",
        "Whether a state says which loop it is in.",
        "A straight line can be told, and so can untrained models: this is not about what the loop computes.", "ours",
        _loop, "guessing, 1 ÷ loops", loops=2),
    CatalogueEntry("online_code", "Online code length", "Linear probes",
        "bits per label to send all labels, portion by portion, each by a probe fitted to those before",
        "0 and above, bit", "How easily a variable is read: accuracy and the data that it takes, in one number.",
        "Depends on the order and the portions; compare places, not papers.", "2003.12298", _code,
        "labels of other examples"),
    CatalogueEntry("steering", "Steering along a probe", "Linear probes",
        "mean logit of an answer when dose · direction is added at the middle (loop, layer)", "any, nat",
        "Whether the direction that a probe reads is one that the model uses.",
        "Any push of some size changes an answer: compare with random directions. The dose is in root mean "
        "squares of the states there.", "2308.10248", _steering, f"the mean of {RANDOM} random directions"),
)
