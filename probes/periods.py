"""Cycles of the state over loops: how often it turns round, with what period, and how much of its motion that is.

    found = periods(rec.residual_stream(), rec.topology)            # period, power, winding [layer, batch, pos]
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float

from hooks.topology import Topology
from probes.geometry import cycle_coords, states_by_loop
from probes.measurement import measurement

SOURCE = "periodogram: Schuster 1898; winding number of the orbit in its principal plane"

LEAST_LOOPS = 6


def periods(residual: xr.DataArray, topology: Topology, *, skip: int = 0) -> xr.Dataset:
    """Dominant period, its share of the motion, and turns about the centre; over (layer, batch, pos).

    ``residual`` is `Recording.residual_stream()`; the first ``skip`` loops are left out. The state after a layer, over
    loops, less its straight line of best fit, has a power spectrum that is summed over dimensions; ``period`` [loop]
    is 1 ÷ the frequency of its peak, and ``power`` the share of the spectrum there: near 1 for a pure cycle. Only
    periods that fit twice into the loops looked at are cycles: a state that slows down on a curve has most of its
    power at longer ones, in untrained models too. What drifts without order has a peak as well, so ``power`` is what
    to look at, and ``chance_power`` is the mean share of the same steps in random order (20 orders). ``winding`` is
    the angle, in turns, that the state sweeps about its mean in the plane of its two largest principal components:
    loops ÷ period for a cycle, at most about one for an arc.

    All are NaN where the state is on a straight line to rounding (1e-4 of its length): there is nothing that could
    turn. Raises ValueError for fewer than 6 loops and states that are not finite.
    """
    x = states_by_loop(residual, topology)[skip:]
    if len(x) < LEAST_LOOPS or skip < 0:
        raise ValueError(f"a period takes at least {LEAST_LOOPS} loops, and {max(len(x), 0)} are left: run more.")
    path = np.moveaxis(x, 0, -2).astype(np.float64)                        # [layer, batch, pos, loop, d_model]
    rest = _detrended(path)
    straight = np.linalg.norm(rest, axis=(-1, -2)) <= 1e-4 * np.linalg.norm(path - path[..., :1, :], axis=(-1, -2))
    frequency, power = _peak(rest)
    rng, steps = np.random.default_rng(0), np.diff(path, axis=-2)
    shuffled = [_peak(_detrended(np.cumsum(np.concatenate(
        [path[..., :1, :], steps[..., rng.permutation(steps.shape[-2]), :]], -2), -2)))[1] for _ in range(20)]
    values = {"period": (1 / frequency, "dominant period", "loop"), "power": (power, "share of the motion in it", "1"),
              "chance_power": (np.mean(shuffled, 0), "share, for the same steps in random order", "1"),
              "winding": (_turns(path), "turns about the centre", "turn")}
    coords = {name: coord for name, coord in cycle_coords(residual, topology).items() if name != "loop"}
    return xr.Dataset({name: measurement(np.where(straight, np.nan, value), ("layer", "batch", "pos"), units=units,
                                         long_name=long_name, source=SOURCE, coords=coords,
                                         definition="of the state after a layer over loops, less its line of best fit")
                       for name, (value, long_name, units) in values.items()},
                      attrs={"n_loops": topology.n_loops, "skip": skip})


def _detrended(path: Float[np.ndarray, "*place loop d_model"]) -> Float[np.ndarray, "*place loop d_model"]:
    k = np.arange(path.shape[-2]) - (path.shape[-2] - 1) / 2
    slope = np.einsum("k,...kd->...d", k, path) / (k @ k)
    return path - path.mean(-2, keepdims=True) - k[:, None] * slope[..., None, :]


def _peak(rest: Float[np.ndarray, "*place loop d_model"]) -> tuple[np.ndarray, np.ndarray]:
    """The frequency per loop with the most power, of 2 ÷ loops or more, and the share of all power that is there.

    A zero-padded spectrum finds it between bins; its share is that of the nearest bin and its neighbours.
    """
    n, finer = rest.shape[-2], 16
    fine = np.square(np.abs(np.fft.rfft(rest, finer * n, axis=-2))).sum(-1)
    peak = (fine[..., 2 * finer:].argmax(-1) + 2 * finer) / finer                    # in turns over all loops
    bins = np.square(np.abs(np.fft.rfft(rest, axis=-2))).sum(-1)
    place = np.arange(bins.shape[-1])
    around = (np.abs(place - np.rint(peak)[..., None]) <= 1) & (place >= 2)
    total = bins.sum(-1)
    return peak / n, (bins * around).sum(-1) / np.where(total > 0, total, 1.0)


def _turns(path: Float[np.ndarray, "*place loop d_model"]) -> Float[np.ndarray, "*place"]:
    centred = path - path.mean(-2, keepdims=True)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ np.swapaxes(axes[..., :2, :], -1, -2)                          # [*place, loop, 2]
    angle = np.unwrap(np.arctan2(plane[..., 1], plane[..., 0]), axis=-1)
    return np.abs(angle[..., -1] - angle[..., 0]) / (2 * np.pi)
