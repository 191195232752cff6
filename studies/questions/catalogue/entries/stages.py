"""Stages in the catalogue: may one loop do another's work, and what does each add to the answer?"""

from __future__ import annotations

import xarray as xr

from probes import exchange, gains, measurement, responses, tau
from probes.cycles import own_loops
from studies.questions.catalogue.entries.entry import CatalogueEntry, averaged, example_mean, with_interval
from studies.questions.catalogue.entries.setting import Setting

FEW = 16
"""Examples whose loops are exchanged."""


def _tau(setting: Setting) -> xr.Dataset:
    few = setting.first(FEW)
    cycle = own_loops(few.run.context.topology)
    return with_interval(tau(exchange(few.model, few.inputs, cycle, scored=few.scored, t=few.t)))


def _gains(setting: Setting) -> xr.Dataset:
    found = gains(setting.model, setting.inputs, own_loops(setting.run.context.topology), targets=setting.targets,
                  scored=setting.scored, t=setting.t)
    return example_mean(averaged(found.prefix, ["pos"]), null=averaged(found.line, ["pos"]))


def _responses(setting: Setting) -> xr.Dataset:
    few = setting.first(FEW)
    found = responses(few.model, few.inputs, own_loops(few.run.context.topology), t=few.t, seed=few.seed)
    names = {"cos_loop": "same layer, other loop", "cos_layer": "other layer, other loop", "E": "E", "rho": "ρ"}
    return with_interval(measurement([float(found[name]) for name in names], ("quantity",), units="1",
                               long_name="likeness of responses to a small push",
                               definition=found.E.attrs.get("definition", ""), source=found.E.attrs.get("source", ""),
                               coords={"quantity": list(names.values())}))


STAGES = (
    CatalogueEntry("exchange", "Exchange of loops", "Stages",
        "τ(k, j) = 1 − KL(loop j does loop k's work) ÷ KL(loop k left out)", "up to 1; 0 is as good as leaving it out",
        "Whether loops can do each other's work: the stage test's main number.",
        "Undefined for loops without work. The verdict needs controls and error rates: docs/stage_test.md.",
        "docs/stage_test.md", _tau, matrix=True, loops=2),
    CatalogueEntry("gains", "Gain by loop", "Stages", "recalibrated NLL after k loops", "0 and above, nat",
        "How much each loop adds to the answer, over- and underconfidence taken out.",
        "Recalibrated with two numbers on half of the examples.", "docs/stage_test.md", _gains,
        "the straight line through the states of loops 0 and 1", loops=2),
    CatalogueEntry("responses", "Responses to a push", "Stages",
        "cosines of the responses of layers and loops to the same small push; E and ρ combine them",
        "cosines and E −1 to 1, ρ any", "Whether a map does the same at another loop, to first order.",
        "Blind to what maps add whatever they are given: two maps may respond alike and do different things.",
        "2604.11791; docs/stage_test.md", _responses, loops=2),
)
