"""Similarity: do two sets of states hold the same geometry, whatever their basis?

Second stop of the way hooks → probes → studies → app. Linear CKA compares the inner products
between examples, so that layers of different models and widths can be compared too.

    linear_cka(x, y)                                       # x [example, d], y [example, d']: 1 is the same geometry
    cka_between_depths(rec.residual_stream())              # (depth, depth_b)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped
from torch import Tensor

from probes.intervals import jackknife
from probes.measurement import check_finite, measurement

SOURCE = "arXiv 1905.00414; unbiased estimator: arXiv 2010.15327, Song et al. 2012"


def linear_cka(x: Float[Tensor, "example d_x"], y: Float[Tensor, "example d_y"], unbiased: bool = True) -> xr.DataArray:
    """Linear centred kernel alignment, HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with K = x xᵀ, L = y yᵀ; a scalar.

    1 for the same geometry up to rotation and scale. With ``unbiased`` HSIC is estimated without bias
    (Song et al. 2012), so that unrelated states score 0 on average and single values may be negative; otherwise
    with the plain estimator, which is above 0 for few examples even then. No matrix is larger than examples² or d².
    0 where the states of one side are the same in all examples: they have no geometry to share.

    Raises ValueError for different numbers of examples, fewer than 4 (unbiased) or 2, or states that are not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be [example, d] with the same examples, not {tuple(x.shape)} and "
                         f"{tuple(y.shape)}.")
    a, b = (v.detach().cpu().double().numpy()[None] for v in (x, y))
    return _described(_cka(a, b, unbiased).reshape(()), (), unbiased, {})


def cka_between_depths(residual: xr.DataArray, other: xr.DataArray | None = None, *,
                       unbiased: bool = True) -> xr.DataArray:
    """Linear CKA of each two depths, (depth, depth_b), examples being all (batch, pos) together.

    ``residual`` is `Recording.residual_stream()`; ``other``, by default the same, may come from another model run on
    the same tokens. 0 where the states of a depth are all the same. Raises ValueError if the two hold different
    examples, there are too few of them, or states are not finite.
    """
    x, y, coords = _paired(residual, other)
    x, y = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, y))
    return _described(_cka(x, y, unbiased), ("depth", "depth_b"), unbiased, coords)


Kind = Literal["cka", "procrustes", "cosine"]

KINDS: Mapping[Kind, tuple[str, str, str]] = {
    "cka": ("linear CKA", "HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with linear kernels over examples, unbiased HSIC",
            SOURCE),
    "procrustes": ("Procrustes similarity", "‖XᵀY‖_* / (‖X‖ ‖Y‖), states centred",
                   "Schönemann 1966; arXiv 2110.14739"),
    "cosine": ("cosine", "mean over examples of cos(x, y), states centred", "after arXiv 2401.12973"),
}
"""Long name, formula and source of each measure of `between_depths`."""


def between_depths(residual: xr.DataArray, other: xr.DataArray | None = None, *, kind: Kind = "cka",
                   units: Literal["example", "position"] = "example", seed: int = 0) -> xr.Dataset:
    """Likeness of each two depths, within a model or between two: ``value``, ``low``, ``high`` over (depth, depth_b).

    ``cka`` asks for the same geometry up to rotation and scale of directions together, ``procrustes`` for one rotation
    that carries one set of states onto the other (1: up to rotation and scale the same; from 0 to 1, and above 0 for
    unrelated states: the fewer examples for the dimensions, the higher), ``cosine`` for the same directions in the
    same basis, of states less their mean over examples, which a norm that all states share would otherwise decide.

    With ``units`` "example", an example is one point, its positions side by side in one long vector (procrustes and
    cosine: points are positions, judged example by example), since positions of one example are no independent
    points; "position" takes each for a point. ``low`` and ``high`` are a 95% interval by leaving examples out
    (`probes.intervals.jackknife`), so that positions of one example stay together in either case.

    Raises ValueError for an unknown kind, recordings of different examples, cosines between different widths, fewer
    than 5 examples, and states that are not finite.
    """
    if kind not in KINDS or units not in ("example", "position"):
        raise ValueError(f"kind must be one of {', '.join(KINDS)} and units example or position, not {kind!r} and "
                         f"{units!r}.")
    x, y, coords = _paired(residual, other)
    x, y = x.astype(np.float64), y.astype(np.float64)
    if x.shape[1] < 5:
        raise ValueError(f"likeness over examples takes at least 5 of them, not {x.shape[1]}.")
    if kind == "cosine" and x.shape[-1] != y.shape[-1]:
        raise ValueError(f"a cosine is between vectors of one width, not {x.shape[-1]} and {y.shape[-1]}: "
                         "kind='procrustes' or 'cka' compare different widths.")
    for v in (x, y):
        check_finite(v, "one set of states")

    def statistic(chosen: np.ndarray) -> np.ndarray:
        a, b = x[:, chosen], y[:, chosen]
        if kind == "cka":
            a, b = (v.reshape(len(v), len(chosen), -1) if units == "example" else v.reshape(len(v), -1, v.shape[-1])
                    for v in (a, b))
            return _cka(a, b, unbiased=True)
        a, b = (v - v.mean((1, 2), keepdims=True) for v in (a, b))
        return _procrustes(a, b) if kind == "procrustes" else _cosines(a, b)

    long_name, formula, source = KINDS[kind]
    parts = zip(("value", "low", "high"), jackknife(statistic, x.shape[1], seed=seed), strict=True)
    return xr.Dataset({name: measurement(value, ("depth", "depth_b"), long_name=long_name, units="1", source=source,
                                         definition=f"{formula}; 95% interval: delete-a-group jackknife over examples",
                                         coords=coords) for name, value in parts}, attrs={"kind": kind, "units": units})


CONSTANT = 1e-12
"""Deviations from the mean, relative to the largest value, below which states are the same in all examples."""

# ---------------------------------------------------------------------- private

def _paired(residual: xr.DataArray, other: xr.DataArray | None,
            ) -> tuple[Shaped[np.ndarray, "a example pos d_x"], Shaped[np.ndarray, "b example pos d_y"],
                       dict[Hashable, Any]]:
    """The states of two recordings of the same examples (or one twice), and coordinates of (depth, depth_b)."""
    other = residual if other is None else other
    x, y = (r.transpose("depth", "batch", "pos", "d_model").to_numpy() for r in (residual, other))
    if x.shape[1:3] != y.shape[1:3]:
        raise ValueError(f"the two recordings hold {x.shape[1:3]} and {y.shape[1:3]} examples × positions: "
                         "run both models on the same tokens.")
    coords: dict[Hashable, Any] = {name: c for name, c in residual.coords.items() if c.dims == ("depth",)}
    coords |= {f"{name}_b": ("depth_b", c.to_numpy()) for name, c in other.coords.items() if c.dims == ("depth",)}
    return x, y, coords


def _described(values: np.ndarray, dims: tuple[str, ...], unbiased: bool, coords: dict[Hashable, Any]) -> xr.DataArray:
    definition = ("HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with linear kernels over examples, "
                  + ("unbiased HSIC" if unbiased else "biased HSIC"))
    return measurement(values, dims, long_name="linear CKA", units="1", definition=definition, source=SOURCE,
                       coords=coords)


def _cka(x: Shaped[np.ndarray, "a example d_x"], y: Shaped[np.ndarray, "b example d_y"],
         unbiased: bool) -> Float[np.ndarray, "a b"]:
    n = x.shape[1]
    if n < (least := 4 if unbiased else 2):
        raise ValueError(f"CKA needs at least {least} examples, not {n}.")
    for v in (x, y):
        check_finite(v, "one set of states")
    # Neither estimator sees a constant offset; without it the differences below lose no digits.
    sizes = [np.abs(v).max((1, 2)).astype(np.float64) for v in (x, y)]
    x, y = (v.astype(np.float64) - v.mean(1, keepdims=True, dtype=np.float64) for v in (x, y))
    varies = [np.abs(v).max((1, 2)) > CONSTANT * size for v, size in zip((x, y), sizes, strict=True)]
    own_x, own_y = (np.array([_hsic(one[None], one[None], unbiased)[0, 0] for one in v]) for v in (x, y))
    defined = np.outer(*varies) & (np.outer(own_x, own_y) > 0)
    return np.where(defined, _hsic(x, y, unbiased) / np.sqrt(np.where(defined, np.outer(own_x, own_y), 1.0)), 0.0)


def _hsic(x: Shaped[np.ndarray, "a example d_x"], y: Shaped[np.ndarray, "b example d_y"],
          unbiased: bool) -> Shaped[np.ndarray, "a b"]:
    """HSIC of each pair up to a factor that CKA cancels, written in features where they are fewer than examples.

    Biased: tr(K L) = ‖xᵀy‖². Unbiased: Song et al. 2012, eq. 5, in which K̃ and L̃ have no diagonals.
    """
    n = x.shape[1]
    if n < min(x.shape[2], y.shape[2]):
        k_of, l_of = (np.matmul(v, v.transpose(0, 2, 1)).reshape(len(v), -1) for v in (x, y))
        trace = k_of @ l_of.T
    else:
        wide = y.transpose(1, 0, 2).reshape(n, -1)                                # one large product per x
        trace = np.stack([np.square(one.T @ wide).reshape(-1, len(y), y.shape[2]).sum((0, 2)) for one in x])
    if not unbiased:
        return trace
    k_diagonal, l_diagonal = np.square(x).sum(-1), np.square(y).sum(-1)           # [site, example]
    k_rows = (x @ x.sum(1)[..., None])[..., 0] - k_diagonal                       # K̃1
    l_rows = (y @ y.sum(1)[..., None])[..., 0] - l_diagonal
    return (trace - k_diagonal @ l_diagonal.T                                     # tr(K̃L̃)
            + np.outer(k_rows.sum(-1), l_rows.sum(-1)) / ((n - 1) * (n - 2)) - 2 / (n - 2) * k_rows @ l_rows.T)


def _procrustes(x: Float[np.ndarray, "a example pos d_x"], y: Float[np.ndarray, "b example pos d_y"],
                ) -> Float[np.ndarray, "a b"]:
    """Nuclear norm of XᵀY relative to both norms; 0 where one side does not vary."""
    one, two = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, y))
    size = np.outer(np.linalg.norm(one, axis=(1, 2)), np.linalg.norm(two, axis=(1, 2)))
    shared = np.array([[np.linalg.svd(a.T @ b, compute_uv=False).sum() for b in two] for a in one])
    return np.where(size > 0, shared / np.where(size > 0, size, 1.0), 0.0)


def _cosines(x: Float[np.ndarray, "a example pos d_model"], y: Float[np.ndarray, "b example pos d_model"],
             ) -> Float[np.ndarray, "a b"]:
    """Mean cosine of the states of the same example and position; 0 where one of them is the mean."""
    one, two = (v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-30) for v in (x, y))
    return np.einsum("aepd,bepd->ab", one, two) / (x.shape[1] * x.shape[2])
