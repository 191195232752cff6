"""Intrinsic dimension: on how many coordinates the states of a depth depend, straight or curved.

    intrinsic_dimension(rec.residual_stream())                      # value, low, high [depth]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from sklearn.neighbors import NearestNeighbors

from probes.intervals import jackknife
from probes.measurement import check_finite, measurement

SOURCE = "TwoNN: Facco et al. 2017, maximum likelihood"


def intrinsic_dimension(residual: xr.DataArray, *, max_points: int = 2000, seed: int = 0) -> xr.Dataset:
    """The dimension of the cloud of states at each depth: ``value`` with its 95% interval ``low``, ``high`` (depth,).

    TwoNN: N ÷ Σ log(r₂/r₁), r₁ and r₂ the distances of a state to its nearest and second nearest one. Unlike the
    effective rank it sees a curved line as one dimension. It falls short where the dimension is high and the states
    few, as the true density is not even at the distance of the neighbours: compare depths, not models of different
    size. States that are equal to their neighbour count once. At most ``max_points`` states are used, of whole
    examples drawn at random; the interval leaves examples out (`probes.intervals.jackknife`).

    NaN at a depth with fewer than 10 different states. Raises ValueError for fewer than 4 examples, or states that
    are not finite.
    """
    x = residual.transpose("depth", "batch", "pos", "d_model").to_numpy()
    check_finite(x, "the residual stream")
    n = min(x.shape[1], max(4, max_points // x.shape[2]))
    chosen = np.sort(np.random.default_rng(seed).permutation(x.shape[1])[:n])

    def statistic(index: np.ndarray) -> np.ndarray:
        return np.array([_two_nn(states[index].reshape(-1, x.shape[-1])) for states in x[:, chosen]])

    parts = zip(("value", "low", "high"), jackknife(statistic, n, seed=seed), strict=True)
    coords: dict[Any, Any] = {name: c for name, c in residual.coords.items() if c.dims == ("depth",)}
    return xr.Dataset({name: measurement(value, ("depth",), units="1", source=SOURCE, long_name="intrinsic dimension",
                                         definition="N / Σ log(r₂/r₁)", coords=coords) for name, value in parts},
                      attrs={"points": n * x.shape[2]})


def _two_nn(points: np.ndarray) -> float:
    points = np.unique(points, axis=0)
    if len(points) < 10:
        return np.nan
    distance, _ = NearestNeighbors(n_neighbors=3).fit(points).kneighbors(points)
    ratio = np.log(distance[:, 2] / np.maximum(distance[:, 1], 1e-30))
    return len(points) / ratio.sum()
