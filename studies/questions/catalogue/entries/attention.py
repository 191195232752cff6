"""Attention in the catalogue: where heads look, and whether loops look elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr

from hooks import HookedLoopMDM, Unavailable
from hooks.model.sampling import SamplerConfig, sample
from probes import attention_over_steps, attention_summary, head_kinds, pattern_distance
from studies.questions.catalogue.entries.entry import (
    CatalogueEntry,
    averaged,
    example_mean,
    quantities,
    with_interval,
)
from studies.questions.catalogue.entries.setting import Setting

FEW = 8
"""Examples that are generated, step by step."""
STEPS = 4
KINDS = ("self", "previous", "next", "same_token")


def _summary(setting: Setting) -> xr.Dataset:
    return attention_summary(setting.model, setting.inputs, n_loops=setting.n_loops, t=setting.t, per_example=True)


def _over_heads(name: str) -> Callable[[Setting], xr.Dataset]:
    def measure(setting: Setting) -> xr.Dataset:
        return example_mean(averaged(_summary(setting)[name], ["head"]).rename(batch="example"))

    return measure


def _flow(setting: Setting) -> xr.Dataset:
    flow = averaged(_summary(setting).flow_over_chance, ["head"]).rename(batch="example")
    pairs = {f"{query} → {key}": flow.sel(query_role=query, key_role=key, drop=True)
             for query in flow.query_role.values for key in flow.key_role.values}
    return example_mean(quantities(pairs))


def _kinds(setting: Setting) -> xr.Dataset:
    found = head_kinds(setting.model, setting.inputs, n_loops=setting.n_loops, t=setting.t, where=setting.scored)
    parts = {}
    for kind in KINDS:
        name = f"{kind}_over_chance"
        if name in found and bool(found[name].notnull().any()):
            parts[kind.replace("_", " ")] = found[name].max("head", keep_attrs=True)
    name = "attention ÷ chance, of the head with most"
    return example_mean(quantities(parts).assign_attrs(long_name=name, units="1"))


def _stability(setting: Setting) -> xr.Dataset:
    found = head_kinds(setting.model, setting.inputs, n_loops=setting.n_loops, t=setting.t)
    return example_mean(averaged(found.stability, ["head"]))


def _distance(setting: Setting) -> xr.Dataset:
    found = pattern_distance(setting.model, setting.inputs, n_loops=setting.n_loops, t=setting.t)
    return with_interval(found.frobenius)


def _sinks_over_steps(setting: Setting) -> xr.Dataset:
    model = setting.model
    if not isinstance(model, HookedLoopMDM):
        raise Unavailable(f"{model.name} is not generated from step by step here: the sampler is one for LoopMDMs.")
    few = setting.first(FEW)
    config = SamplerConfig(n_steps=STEPS, n_loops=few.n_loops or model.max_loops)
    steps = [step.before for step in sample(model, few.inputs, config)]
    found = attention_over_steps(model, steps, n_loops=few.n_loops)
    return example_mean(averaged(found.sink_rate, ["head"]))


ATTENTION = (
    CatalogueEntry("attention_flow", "Attention flow", "Attention",
        "share of attention from one role of positions to another ÷ the share under even attention",
        "0 and above, 1 is chance", "Whether masked positions look at visible ones or at each other.",
        "The share itself follows the number of keys, and so does not compare noise levels.", "ours, after 2605.26106",
        _flow),
    CatalogueEntry("attention_entropy", "Attention entropy", "Attention",
        "−Σ_j A_ij log A_ij, mean over queries and heads", "0 to log(keys), nat", "How wide heads look.",
        "Grows with the number of keys.", "2604.11791", _over_heads("entropy")),
    CatalogueEntry("sinks", "Attention sinks", "Attention",
        "share of keys that get 0.3 of the attention or more in the mean over queries, mean over heads", "0 to 1",
        "Whether attention goes to keys that all queries share.", "A key that matters to all is a sink, too.",
        "2510.06477, 2510.15731", _over_heads("sink_rate")),
    CatalogueEntry("sinks_over_steps", "Sinks over denoising steps", "Attention",
        f"the sink rate at each of {STEPS} denoising steps", "0 to 1", "Whether sinks move as positions are revealed.",
        "The number of masked positions changes from step to step, and with it what there is to look at.", "2510.15731",
        _sinks_over_steps),
    CatalogueEntry("head_kinds", "Kinds of heads", "Attention",
        "attention to itself, to the previous and next position and to the same token, ÷ even attention, of "
        "the head with most", "0 and above, 1 is chance",
        "Whether there are heads of a known kind, and in which loops.",
        "The head with most is chosen among all, for each example: a little above 1 is chance.",
        "2209.11895, 1905.09418", _kinds),
    CatalogueEntry("stability", "Stability of attention", "Attention",
        "1 − ½ Σ_j |A_ij − A'_ij|, A' the pattern one loop earlier", "0 to 1",
        "Whether a loop looks where the last one did.", "Untrained models come near 1: they look everywhere, always.",
        "2604.11791", _stability, loops=2),
    CatalogueEntry("pattern_distance", "Distance of patterns", "Attention",
        "‖A − B‖_F ÷ √(‖A‖_F² + ‖B‖_F²), heads by index", "0 to 1", "Which depths look alike.",
        "Of different layers, heads of one index have nothing in common but the index.",
        "2604.11791, normalisation ours", _distance, matrix=True),
)
