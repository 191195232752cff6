"""Causal effects of the catalogue: what becomes of the answer when something is changed on the way."""

from __future__ import annotations

from functools import lru_cache

import torch
import xarray as xr

from hooks.contract import Inputs
from probes import causal_scan, head_scan, measurement, path_effects
from probes.causal import (
    Metric,
    attribution_error,
    attribution_patch_resid_pre,
    get_act_patch_loops,
    get_act_patch_resid_pre,
    nll_of,
)
from studies.questions.catalogue.entries.entry import CatalogueEntry, example_mean, with_interval
from studies.questions.catalogue.entries.setting import Setting

FEW = 4
"""Examples of patching, which runs once for every depth, position and example."""


def _scan(setting: Setting) -> xr.Dataset:
    return example_mean(causal_scan(setting.model, setting.inputs, targets=setting.targets, n_loops=setting.n_loops,
                                  t=setting.t, scored=setting.scored, seed=setting.seed).nll)


def _heads(setting: Setting) -> xr.Dataset:
    return example_mean(head_scan(setting.model, setting.inputs, targets=setting.targets, n_loops=setting.n_loops,
                                t=setting.t, scored=setting.scored, seed=setting.seed).nll)


def _paths(setting: Setting) -> xr.Dataset:
    return example_mean(path_effects(setting.model, setting.inputs, targets=setting.targets, n_loops=setting.n_loops,
                                   t=setting.t, scored=setting.scored).nll)


def _pair(setting: Setting) -> tuple[Setting, Inputs, Metric]:
    """Few examples, the inputs of other examples in their place, and the NLL of the right answers."""
    few = setting.first(FEW)
    if few.n < 2:
        raise ValueError("patching takes the states of one example into another, and there is one.")
    others = few.model.select(few.inputs, torch.arange(few.n).roll(1))
    return few, others, nll_of(few.targets.clamp_min(0), few.scored)


def _restored(found: xr.DataArray) -> xr.Dataset:
    """The share of the corrupted run's loss that a patch takes back, of means over examples."""
    whole = (found.corrupted - found.clean).mean("example")
    share = (found.corrupted - found).mean("example") / whole
    return with_interval(share.assign_attrs(found.attrs, units="1", long_name="share restored"))


@lru_cache(maxsize=1)
def _exact(setting: Setting) -> xr.DataArray:
    few, others, metric = _pair(setting)
    return get_act_patch_resid_pre(few.model, others, few.inputs, metric, n_loops=few.n_loops, t=few.t)


def _patching(setting: Setting) -> xr.Dataset:
    return _restored(_exact(setting))


def _loops(setting: Setting) -> xr.Dataset:
    few, others, metric = _pair(setting)
    return _restored(get_act_patch_loops(few.model, others, few.inputs, metric, n_loops=few.n_loops, t=few.t))


def _attribution(setting: Setting) -> xr.Dataset:
    few, others, metric = _pair(setting)
    attributed = attribution_patch_resid_pre(few.model, others, few.inputs, metric, n_loops=few.n_loops, t=few.t)
    error = attribution_error(attributed, _exact(setting))
    return with_interval(measurement(error.values, [str(dim) for dim in error.dims], long_name="RMS error ÷ RMS effect",
                               definition="√ mean (attributed − exact)² ÷ √ mean (exact − corrupted)²", units="1",
                               source="2310.10348", coords=dict(error.coords)))


CAUSAL = (
    CatalogueEntry("causal_scan", "Causal scan", "Causal effects",
        "NLL(layer changed) − NLL(clean); skip: left out; mean: adds its mean over examples; resample: what "
        "it adds for another example; repeat: twice; freeze: what it added one loop before", "any, nat",
        "Which layer of which loop the answer depends on.",
        "Later layers may make up for a loss, and a change that the model never met in training does harm of "
        "its own. A layer that adds nothing has no effect by construction.", "2406.19384, 2301.04709, 2202.05262",
        _scan),
    CatalogueEntry("head_scan", "Head scan", "Causal effects",
        "NLL(head's output := its mean over examples) − NLL(clean)", "any, nat",
        "Which head of which loop the answer depends on.",
        "Heads back each other up: a small effect is no proof of no use.", "2202.05262", _heads, matrix=True),
    CatalogueEntry("path_effects", "Path effects", "Causal effects",
        "NLL(loop i's update hidden from loop j alone) − NLL(clean)", "any, nat",
        "Which later loop reads what a loop wrote.",
        "Rows do not add up to the loop's whole effect: paths through several loops are in none of them.", "2304.05969",
        _paths, matrix=True, loops=2),
    CatalogueEntry("patching", "Activation patching", "Causal effects",
        "(NLL_corrupted − NLL_patched) ÷ (NLL_corrupted − NLL_clean), the clean state patched in at one "
        "position before one (loop, layer)", "about 0 to 1",
        "Where, and until when, the information that decides the answers is carried by a position.",
        "The corrupted run is another example's, and answers that both share cannot show.", "2202.05262", _patching,
        matrix=True),
    CatalogueEntry("loop_patching", "Loop-to-loop patching", "Causal effects",
        "the same, the clean state after loop j put in after loop i, all positions", "about 0 to 1",
        "Whether a state fits at another loop than its own.",
        "Off the diagonal the state meets a clock that is not its own: see the exchange of loops.", "ours", _loops,
        matrix=True, loops=2),
    CatalogueEntry("attribution", "Attribution patching", "Causal effects",
        "√ mean (a − e)² ÷ √ mean (e − corrupted)², a = corrupted + ΔX · gradient, e the exact patch", "0 and above",
        "How far the first-order approximation of patching can be trusted at each place.",
        "Above 1 it is worse than to say that nothing has an effect.", "2310.10348", _attribution),
)
