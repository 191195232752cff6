"""Similarity in the catalogue: do two depths, or two models, hold the same?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import xarray as xr

from hooks import Unavailable
from probes import between_depths
from probes.similarity import Kind
from studies.questions.catalogue.entries.entry import CatalogueEntry, with_interval
from studies.questions.catalogue.entries.setting import Setting, stream


def _within(kind: Kind) -> Callable[[Setting], xr.Dataset]:
    def measure(setting: Setting) -> xr.Dataset:
        found = between_depths(setting.residual, kind=kind, seed=setting.seed)
        return with_interval(found.value, found.low, found.high)

    return measure


@torch.no_grad()
def _twin(setting: Setting) -> xr.Dataset:
    if setting.twin is None:
        raise Unavailable("there is no second model to compare with.")
    other = stream(setting.twin.run(setting.inputs, t=setting.t))
    found = between_depths(setting.residual, other, kind="cka", seed=setting.seed)
    return with_interval(found.value, found.low, found.high)


LIKENESS = (
    CatalogueEntry("cka", "CKA", "Similarity", "HSIC(K, L) ÷ √(HSIC(K, K) HSIC(L, L)), unbiased, linear kernels",
        "about 0 to 1", "Whether two depths hold the same geometry, up to rotation and scale.",
        "High wherever one direction dominates: near 1 between all depths of untrained models. Examples are "
        "the units: positions of one example are no independent points.", "1905.00414, Song et al. 2012",
        _within("cka"), matrix=True),
    CatalogueEntry("procrustes", "Procrustes", "Similarity", "‖XᵀY‖_* of centred states of norm 1", "0 to 1",
        "Whether one rotation carries the states of one depth onto those of the other.",
        "Above 0 for unrelated states: the more so, the fewer they are for the dimensions.",
        "Schönemann 1966; 2110.14739", _within("procrustes"), matrix=True),
    CatalogueEntry("cosine", "Cosine between depths", "Similarity",
        "mean cos(X_a, X_b), states less their mean over examples", "−1 to 1",
        "Whether states keep their directions in one basis.",
        "A residual stream keeps what was added: depths near each other are alike by construction.", "after 2401.12973",
        _within("cosine"), matrix=True),
    CatalogueEntry("cka_twin", "CKA with the twin", "Similarity",
        "the same, depths of this model against those of its unlooped twin", "about 0 to 1",
        "At which loops the LoopMDM holds what the twin holds, and where.",
        "Two models of one task agree on much that the input alone decides: compare with an untrained one.",
        "1905.00414", _twin, matrix=True),
)
