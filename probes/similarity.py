"""Similarity: do two sets of states hold the same geometry, whatever their basis?

Second stop of the way hooks → probes → studies → app. Linear CKA compares the inner products
between examples, so that layers of different models and widths can be compared too.

    linear_cka(x, y)                                       # x [example, d], y [example, d']: 1 is the same geometry
    cka_between_depths(rec.residual_stream())              # (depth, depth_b)
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped
from torch import Tensor

from probes.measurement import check_finite, measurement

SOURCE = "arXiv 1905.00414; unbiased estimator: arXiv 2010.15327, Song et al. 2012"


def linear_cka(x: Float[Tensor, "example d_x"], y: Float[Tensor, "example d_y"], unbiased: bool = True) -> xr.DataArray:
    """Linear centred kernel alignment, HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with K = x xᵀ, L = y yᵀ; a scalar.

    1 for the same geometry up to rotation and scale. With ``unbiased`` HSIC is estimated without bias
    (Song et al. 2012), so that unrelated states score 0 on average and single values may be negative; otherwise
    with the plain estimator, which is above 0 for few examples even then. No example × example matrix is made.
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
    other = residual if other is None else other
    x, y = (r.transpose("depth", "batch", "pos", "d_model").to_numpy() for r in (residual, other))
    if x.shape[1:3] != y.shape[1:3]:
        raise ValueError(f"the two recordings hold {x.shape[1:3]} and {y.shape[1:3]} examples × positions: "
                         "run both models on the same tokens.")
    x, y = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, y))
    coords: dict[Hashable, Any] = {name: c for name, c in residual.coords.items() if c.dims == ("depth",)}
    coords |= {f"{name}_b": ("depth_b", c.to_numpy()) for name, c in other.coords.items() if c.dims == ("depth",)}
    return _described(_cka(x, y, unbiased), ("depth", "depth_b"), unbiased, coords)


CONSTANT = 1e-12
"""Deviations from the mean, relative to the largest value, below which states are the same in all examples."""

# ---------------------------------------------------------------------- private

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
    """HSIC of each pair up to a factor that CKA cancels, written in features instead of kernels.

    Biased: tr(K L) = ‖xᵀy‖². Unbiased: Song et al. 2012, eq. 5, in which K̃ and L̃ have no diagonals.
    """
    n = x.shape[1]
    wide = y.transpose(1, 0, 2).reshape(n, -1)                                    # one large product per x
    trace = np.stack([np.square(one.T @ wide).reshape(-1, len(y), y.shape[2]).sum((0, 2)) for one in x])
    if not unbiased:
        return trace
    k_diagonal, l_diagonal = np.square(x).sum(-1), np.square(y).sum(-1)           # [site, example]
    k_rows = (x @ x.sum(1)[..., None])[..., 0] - k_diagonal                       # K̃1
    l_rows = (y @ y.sum(1)[..., None])[..., 0] - l_diagonal
    return (trace - k_diagonal @ l_diagonal.T                                     # tr(K̃L̃)
            + np.outer(k_rows.sum(-1), l_rows.sum(-1)) / ((n - 1) * (n - 2)) - 2 / (n - 2) * k_rows @ l_rows.T)
