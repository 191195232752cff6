"""Geometry: how the residual stream moves from loop to loop, and the shape of the cloud it makes.

Second stop of the way hooks → probes → studies → app. A layer of the cycle is compared with
itself one loop earlier, never with its neighbour: steps, the cosine between them, the distance
to where the loop would end, and the classes and dimensions that follow from these.

    _, rec = model.run_with_cache(noised, n_loops=8, names_filter="blocks.*.hook_resid_post")
    moves = dynamics(rec.residual_stream(), rec.topology, fixed_point=fixed_point(model, noised))
    contraction(moves.distance_to_fixed_point)                          # (layer, batch, pos), per loop
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Shaped

from hooks import Topology
from hooks.contract import Inputs, Levels, LoopedModel
from probes.measurement import measurement

LOOP_STEPS = "arXiv 2509.23314"
FIXED_POINTS = "arXiv 2604.11791"

DISTANCE_FLOOR = 1e-5
"""Relative distances below this are float32 rounding, and tell nothing about contraction."""

TOKEN_CLASSES = ("drifting", "cyclic", "converged")

_DYNAMICS: dict[str, tuple[str, str, str]] = {
    "step_norm": ("step size", "‖Δ_k‖ with Δ_k = X_k − X_(k−1) at the same layer", LOOP_STEPS),
    "step_relative": ("relative step size", "‖Δ_k‖ / ‖X_(k−1)‖", LOOP_STEPS),
    "step_cosine": ("cosine between consecutive steps", "cos(Δ_k, Δ_(k−1))", LOOP_STEPS),
    "step_cosine_unit": ("cosine between consecutive steps of unit-norm states",
                         "cos(Δ_k, Δ_(k−1)) with X_k scaled to norm 1 first", LOOP_STEPS),
    "acceleration": ("acceleration", "‖Δ_k − Δ_(k−1)‖", LOOP_STEPS),
    "distance_to_fixed_point": ("distance to the fixed point", "‖X_k − X*‖ / ‖X*‖", FIXED_POINTS),
}


def dynamics(residual: xr.DataArray, topology: Topology, *, fixed_point: xr.DataArray | None = None) -> xr.Dataset:
    """How each position's state moves over the loops, over (loop, layer, batch, pos) of the looped layers.

    ``residual`` is `Recording.residual_stream()`: depth × batch × pos × d_model. ``step_norm`` (in units of the
    residual stream) and ``step_relative`` start at loop 1, ``step_cosine``, ``step_cosine_unit`` (the same for
    unit-norm states: a turn that comes from growing norms alone disappears there) and ``acceleration`` at loop 2;
    before, they are NaN. With ``fixed_point`` [layer, batch, pos, d_model], also ``distance_to_fixed_point``.
    Sources: 2509.23314 (steps), 2604.11791 (fixed point). Raises ValueError if the shapes do not belong together.
    """
    x = _cycle(residual, topology)
    step = np.diff(x, axis=0)
    unit_step = np.diff(_ratio(x, _norm(x)[..., None]), axis=0)
    values = {"step_norm": _norm(step), "step_relative": _ratio(_norm(step), _norm(x[:-1])),
              "step_cosine": _cosine(step[1:], step[:-1]), "step_cosine_unit": _cosine(unit_step[1:], unit_step[:-1]),
              "acceleration": _norm(np.diff(step, axis=0))}
    if fixed_point is not None:
        target = _matching(fixed_point, x, topology)
        values["distance_to_fixed_point"] = _ratio(_norm(x - target), _norm(target))
    coords = _cycle_coords(residual, topology)
    return xr.Dataset({
        name: measurement(_from_loop(value, topology.n_loops), ("loop", "layer", "batch", "pos"), units="1",
                          long_name=_DYNAMICS[name][0], definition=_DYNAMICS[name][1], source=_DYNAMICS[name][2],
                          coords=coords)
        for name, value in values.items()})


@torch.no_grad()
def fixed_point(model: LoopedModel, inputs: Inputs, *, n_loops: int = 128, t: Levels = None) -> xr.DataArray:
    """X*: the state after each looped layer once ``n_loops`` loops have run, layer × batch × pos × d_model.

    Whether it is a fixed point at all is for the reader to see: the coordinate ``last_step`` [layer, batch, pos]
    is ‖X_k − X_(k−1)‖ / ‖X_(k−1)‖ at the last loop. Source: 2604.11791. Raises ValueError for fewer than 2 loops.
    """
    if n_loops < 2:
        raise ValueError(f"n_loops must be at least 2 to see whether the state still moves, not {n_loops}.")
    topology = model.topology(n_loops)
    sites = [[model.site(depth, n_loops=n_loops) for depth in loop] for loop in topology.loop_depths()[-2:]]
    _, rec = model.run_with_cache(inputs, n_loops, t=t, names_filter=[site for loop in sites for site in loop])
    before, last = (torch.stack([rec[site] for site in loop]).float() for loop in sites)
    last_step = ((last - before).norm(dim=-1) / before.norm(dim=-1)).cpu().numpy()
    return measurement(last, ("layer", "batch", "pos", "d_model"), long_name="fixed point of the residual stream",
                       units="1", definition=f"X* = X after {n_loops} loops", source=FIXED_POINTS,
                       coords={"layer": topology.n_head + np.arange(topology.n_mid),
                               "last_step": (("layer", "batch", "pos"), last_step)})


def contraction(distance: xr.DataArray, *, floor: float = DISTANCE_FLOOR) -> xr.DataArray:
    """Slope of log distance against loop, by least squares; the contraction factor per loop is its exp.

    ``distance`` has a ``loop`` axis, which goes; negative slopes approach the fixed point. Loops at which the
    distance is not above ``floor`` are left out, and where fewer than 3 remain the slope is NaN. Source: 2604.11791.
    """
    y = distance.transpose("loop", ...)
    k = y["loop"].to_numpy().astype(float).reshape(-1, *(1,) * (y.ndim - 1))  # 0, 1, … if it has no coordinate
    values = y.to_numpy().astype(float)
    used = values > floor  # False for NaN
    log = np.log(np.where(used, values, 1.0))
    n = used.sum(0)
    enough = n >= 3
    count = np.where(enough, n, 1)
    k_off = np.where(used, k - (k * used).sum(0) / count, 0.0)
    spread = (k_off ** 2).sum(0)
    slope = np.where(enough, (k_off * log).sum(0) / np.where(enough, spread, 1.0), np.nan)
    dims = y.dims[1:]
    return measurement(slope, [str(d) for d in dims], long_name="contraction (slope of log distance)", units="1",
                       definition="least-squares slope of log ‖X_k − X*‖/‖X*‖ against loop k, where it is above "
                                  f"{floor:g}; exp of it is the factor per loop", source=FIXED_POINTS,
                       coords={name: c for name, c in y.coords.items() if set(c.dims) <= set(dims)})


def classify_tokens(residual: xr.DataArray, topology: Topology, *, fixed_point: xr.DataArray | None = None,
                    threshold: float = 0.99, window: int = 3, max_period: int = 4) -> xr.Dataset:
    """Does each token's state, at each looped layer, converge, cycle or drift? Over (layer, batch, pos).

    - *converged*: cos(X_k, X*) ≥ ``threshold`` at each of the last ``window`` loops;
    - *cyclic*: not converged, and for a period p in 2..``max_period`` cos(X_k, X_(k−p)) is at least ``threshold``
      and above cos(X_k, X_(k−1)) (a slow drift is nearest to the loop before) at each of the last ``window`` loops;
      ``period`` holds the smallest such p (1 if converged, 0 if drifting);
    - *drifting*: neither.

    X* is ``fixed_point``, or else the last recorded loop, with the window just before it. ``token_class`` holds
    0, 1, 2 for drifting, cyclic, converged (attributes flag_values, flag_meanings). After 2604.11791, with the
    thresholds stated here. Raises ValueError if there are too few loops: max(window + 1, window + max_period).
    """
    needed = window + max(1, max_period)
    if topology.n_loops < needed:
        raise ValueError(f"a window of {window} loops and periods up to {max_period} need a recording of at least "
                         f"{needed} loops, this one has {topology.n_loops}: record more, or lower them.")
    x = _cycle(residual, topology)
    if fixed_point is not None:
        near = _cosine(x[-window:], _matching(fixed_point, x, topology)[None])
    else:
        near = _cosine(x[-window - 1:-1], x[-1:])
    period = np.where((near >= threshold).all(0), 1, 0)
    before = _cosine(x[-window:], x[-window - 1:-1])
    for p in range(2, max_period + 1):
        back = _cosine(x[-window:], x[-window - p:len(x) - p])
        period = np.where((period == 0) & ((back >= threshold) & (back > before)).all(0), p, period)
    token_class = np.select([period == 1, period > 1], [2, 1], 0)
    coords = {name: c for name, c in _cycle_coords(residual, topology).items() if name != "loop"}
    rule = (f"converged: cos(X_k, X*) ≥ {threshold} in the last {window} loops; cyclic: cos(X_k, X_(k−p)) ≥ "
            f"{threshold} and above cos(X_k, X_(k−1)) there for a p in 2..{max_period}; drifting: neither")
    shared: dict[str, Any] = {"units": "1", "definition": rule, "source": FIXED_POINTS + "; thresholds ours",
                              "coords": coords}
    dims = ("layer", "batch", "pos")
    classes = measurement(token_class, dims, long_name="fixed-point class of a token", **shared)
    classes.attrs |= {"flag_values": [0, 1, 2], "flag_meanings": " ".join(TOKEN_CLASSES)}
    return xr.Dataset({"token_class": classes,
                       "period": measurement(period, dims, long_name="period of a token's state [loop]", **shared)})


def trajectory_pca(residual: xr.DataArray, n_components: int = 3) -> xr.Dataset:
    """Principal components of all states of all depths, examples and positions together.

    ``coordinates`` (depth, batch, pos, component), ``explained_variance`` and ``explained_variance_ratio``
    (component), ``components`` (component, d_model; the loading of largest size is positive) and ``mean``
    (d_model). Equals scikit-learn's PCA on the flattened states. Raises ValueError for more components than d_model.
    """
    ordered = residual.transpose("depth", "batch", "pos", "d_model")
    x = ordered.to_numpy().astype(np.float64)
    flat = x.reshape(-1, x.shape[-1])
    if not 1 <= n_components <= min(flat.shape):
        raise ValueError(f"n_components must be between 1 and {min(flat.shape)} here, not {n_components}.")
    mean = flat.mean(0)
    centred = flat - mean
    variance, vectors = np.linalg.eigh(centred.T @ centred / (len(flat) - 1))  # ascending; d_model² however many states
    variance, components = variance[::-1].clip(min=0), vectors.T[::-1][:n_components]
    components = components * np.sign(components[np.arange(n_components), np.abs(components).argmax(1)])[:, None]
    coords: dict[Any, Any] = {"component": np.arange(n_components)}
    states = {name: c for name, c in ordered.coords.items() if "d_model" not in c.dims}
    source = "Pearson 1901; Hotelling 1933"
    shared: dict[str, Any] = {"units": "1", "source": source, "coords": coords}
    return xr.Dataset({
        "coordinates": measurement((centred @ components.T).reshape(*x.shape[:-1], n_components),
                                   ("depth", "batch", "pos", "component"), long_name="position in PCA space", units="1",
                                   definition="(X − mean) · component, PCA over depth, batch and pos together",
                                   source=source, coords={**states, **coords}),
        "explained_variance": measurement(variance[:n_components], ("component",), long_name="explained variance",
                                          definition="variance of the coordinates", **shared),
        "explained_variance_ratio": measurement(variance[:n_components] / variance.sum(), ("component",),
                                                long_name="share of variance explained",
                                                definition="variance of the coordinates / total variance", **shared),
        "components": measurement(components, ("component", "d_model"), long_name="principal direction",
                                  definition="eigenvector of the covariance of states", **shared),
        "mean": measurement(mean, ("d_model",), long_name="mean state", definition="mean over depth, batch and pos",
                            units="1", source=source)})


def effective_rank(x: xr.DataArray, *, over: tuple[str, ...] = ("batch", "pos")) -> xr.DataArray:
    """exp of the entropy of σ_i / Σσ, σ the singular values of the [over, d_model] matrix; between 1 and d_model.

    The other axes of ``x`` (depth, say) remain. Not centred. Source: Roy & Vetterli 2007.
    """
    sigma = np.sqrt(_squared_singular_values(x, over))
    return _of_spectrum(x, over, np.exp(_entropy(sigma)), long_name="effective rank",
                        units="1", definition="exp of −Σ p log p with p_i = σ_i / Σσ, singular values of the states",
                        source="Roy & Vetterli 2007")


def matrix_entropy(x: xr.DataArray, *, over: tuple[str, ...] = ("batch", "pos")) -> xr.DataArray:
    """−Σ p_i log p_i [nat] with p_i = σ_i² / Σσ², of the [over, d_model] matrix of states; the other axes remain.

    Not centred. Source: 2510.06477.
    """
    return _of_spectrum(x, over, _entropy(_squared_singular_values(x, over)), long_name="matrix entropy", units="nat",
                        definition="−Σ p log p with p_i = σ_i² / Σσ², singular values of the states",
                        source="arXiv 2510.06477")


# ---------------------------------------------------------------------- private

def _cycle(residual: xr.DataArray, topology: Topology) -> Shaped[np.ndarray, "loop layer batch pos d_model"]:
    """The looped layers' states, loop by loop."""
    if residual.sizes.get("depth") != topology.depth:
        raise ValueError(f"the residual stream has {residual.sizes.get('depth')} depths and the topology "
                         f"{topology.depth}: take both from the same recording (rec.residual_stream(), rec.topology).")
    x = residual.transpose("depth", "batch", "pos", "d_model").to_numpy()
    x = x[topology.n_head:topology.n_head + topology.n_loops * topology.n_mid]
    return x.reshape(topology.n_loops, topology.n_mid, *x.shape[1:])


def _cycle_coords(residual: xr.DataArray, topology: Topology) -> dict[Any, Any]:
    kept = {name: c for name, c in residual.coords.items() if c.dims and set(c.dims) <= {"batch", "pos"}}
    return {"loop": np.arange(topology.n_loops), "layer": topology.n_head + np.arange(topology.n_mid), **kept}


def _matching(fixed_point: xr.DataArray, x: np.ndarray, topology: Topology) -> np.ndarray:
    target = fixed_point.transpose("layer", "batch", "pos", "d_model").to_numpy()
    if target.shape != x.shape[1:]:
        raise ValueError(f"the fixed point has shape {target.shape}, the looped layers' states {x.shape[1:]}: "
                         f"compute it for the same examples and the {topology.n_mid} looped layers.")
    return target


def _from_loop(value: np.ndarray, n_loops: int) -> np.ndarray:
    """NaN for the first loops, in which the quantity is not defined yet."""
    padded = np.full((n_loops, *value.shape[1:]), np.nan, dtype=np.float64)
    padded[n_loops - len(value):] = value
    return padded


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("...d,...d->...", x, x))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where b is zero: a step that was not taken has no direction."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _ratio(np.einsum("...d,...d->...", a, b), _norm(a) * _norm(b))


def _squared_singular_values(x: xr.DataArray, over: tuple[str, ...]) -> np.ndarray:
    """[..., d_model], from the d_model × d_model Gram matrix in float64: its size does not grow with examples."""
    kept = [d for d in x.dims if d not in over and d != "d_model"]
    values = x.transpose(*kept, *over, "d_model").to_numpy().astype(np.float64)
    values = values.reshape(*(x.sizes[d] for d in kept), -1, x.sizes["d_model"])
    return np.linalg.eigvalsh(np.swapaxes(values, -1, -2) @ values).clip(min=0)


def _entropy(weights: np.ndarray) -> np.ndarray:
    p = weights / weights.sum(-1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def _of_spectrum(x: xr.DataArray, over: tuple[str, ...], values: np.ndarray, **attributes: str) -> xr.DataArray:
    dims = [str(d) for d in x.dims if d not in over and d != "d_model"]
    coords = {name: c for name, c in x.coords.items() if set(c.dims) <= set(dims)}
    return measurement(values, dims, coords=coords, **attributes)
