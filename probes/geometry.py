"""Geometry: how the residual stream moves from loop to loop, and the shape of the cloud it makes.

Second stop of the way hooks → probes → studies → app. A layer of the cycle is compared with
itself one loop earlier, never with its neighbour: steps, the cosine between them, the distance
to where the loop would end, and the classes and dimensions that follow from these.

    _, rec = model.run_with_cache(noised, n_loops=8, names_filter="blocks.*.hook_resid_post")
    moves = dynamics(rec.residual_stream(), rec.topology, fixed_point=fixed_point(model, noised))
    contraction(moves.distance_to_fixed_point)                          # exponential or power law, and how well it fits
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Shaped

from hooks import Topology
from hooks.contract import Inputs, Levels, LoopedModel
from probes.measurement import check_finite, measurement

LOOP_STEPS = "arXiv 2509.23314"
FIXED_POINTS = "arXiv 2604.11791"

DISTANCE_FLOOR = 1e-5
"""Relative distances below this are float32 rounding, and tell nothing about contraction."""

LAWS = ("undefined", "constant", "exponential", "power")
"""What a distance over loops may follow, in the order of `contraction`'s ``law``."""

TOKEN_CLASSES = ("drifting", "cyclic", "direction_settled", "state_settled")

STEADY_FIT = 0.99
"""R² from which on the norm is said to grow by the same amount in every loop."""
STEADY_SHARE = 0.05
"""Growth over the loops looked at, as a share of the last norm, below which it is no growth."""

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
    before, they are NaN, and so are cosines with a step that was not taken (the state stood still) and ratios to a
    state of norm 0. With ``fixed_point`` [layer, batch, pos, d_model], also ``distance_to_fixed_point``.
    Sources: 2509.23314 (steps), 2604.11791 (fixed point). Raises ValueError if the shapes do not belong together, or
    states are not finite.
    """
    x = states_by_loop(residual, topology)
    step = np.diff(x, axis=0)
    unit_step = np.diff(_ratio(x, _norm(x)[..., None]), axis=0)
    values = {"step_norm": _norm(step), "step_relative": _ratio(_norm(step), _norm(x[:-1])),
              "step_cosine": _cosine(step[1:], step[:-1]), "step_cosine_unit": _cosine(unit_step[1:], unit_step[:-1]),
              "acceleration": _norm(np.diff(step, axis=0))}
    if fixed_point is not None:
        target = _matching(fixed_point, x, topology)
        apart = _norm(x - target)
        values["distance_to_fixed_point"] = np.where(apart > 0, _ratio(apart, _norm(target)), 0.0)
    coords = cycle_coords(residual, topology)
    return xr.Dataset({
        name: measurement(_from_loop(value, topology.n_loops), ("loop", "layer", "batch", "pos"), units="1",
                          long_name=_DYNAMICS[name][0], definition=_DYNAMICS[name][1], source=_DYNAMICS[name][2],
                          coords=coords)
        for name, value in values.items()})


@torch.no_grad()
def fixed_point(model: LoopedModel, inputs: Inputs, *, n_loops: int = 128, t: Levels = None) -> xr.DataArray:
    """X*: the state after each looped layer once ``n_loops`` loops have run, layer × batch × pos × d_model.

    Whether it is a fixed point at all is for the reader to see: the coordinate ``last_step`` [layer, batch, pos]
    is ‖X_k − X_(k−1)‖ / ‖X_(k−1)‖ at the last loop. Source: 2604.11791. Raises ValueError for fewer than 2 loops,
    and for states that are not finite.
    """
    if n_loops < 2:
        raise ValueError(f"n_loops must be at least 2 to see whether the state still moves, not {n_loops}.")
    topology = model.topology(n_loops)
    sites = [[model.site(depth, n_loops=n_loops) for depth in loop] for loop in topology.loop_depths()[-2:]]
    _, rec = model.run_with_cache(inputs, n_loops, t=t, names_filter=[site for loop in sites for site in loop])
    before, last = (torch.stack([rec[site] for site in loop]).float() for loop in sites)
    check_finite(last, f"the state after {n_loops} loops")
    moved = (last - before).norm(dim=-1)
    last_step = torch.where(moved > 0, moved / before.norm(dim=-1).clamp_min(1e-30), 0.0).cpu().numpy()
    return measurement(last, ("layer", "batch", "pos", "d_model"), long_name="fixed point of the residual stream",
                       units="1", definition=f"X* = X after {n_loops} loops", source=FIXED_POINTS,
                       coords={"layer": topology.n_head + np.arange(topology.n_mid),
                               "last_step": (("layer", "batch", "pos"), last_step)})


def contraction(distance: xr.DataArray, *, floor: float = DISTANCE_FLOOR) -> xr.Dataset:
    """How a distance falls over loops: exponentially, by a power law, or not at all; the better fit and its R².

    ``distance`` has a ``loop`` axis (0, 1, … where it has no coordinate), which goes. Two straight lines are fitted to
    log distance by least squares: ``exponential`` is the slope against loop k (exp of it is the contraction factor per
    loop) and ``power`` that against log(k + 1) (the exponent: −1 is what a state that grows by the same vector in every
    loop does, whose direction settles although nothing contracts). ``exponential_r2`` and ``power_r2`` are their R².

    ``law`` holds an index of `LAWS`: the law of the larger R², given in ``r2``; *constant* where the distance does
    not change (slopes 0, R² 1); *undefined* where fewer than 3 loops have a distance above ``floor`` (slopes and R²
    NaN: the state had arrived, or there were too few loops). A factor means something only where ``law`` is
    exponential. Source: 2604.11791 (the factor); the comparison of laws is ours.
    """
    y = distance.transpose("loop", ...)
    k = y["loop"].to_numpy().astype(float).reshape(-1, *(1,) * (y.ndim - 1))
    values = y.to_numpy().astype(float)
    used = values > floor  # False for NaN
    log = np.log(np.where(used, values, 1.0))
    exponential, power = (_line(x, log, used) for x in (k, np.log(k + 1)))
    enough = used.sum(0) >= 3
    still = enough & (exponential[2] <= CONSTANT)
    law = np.select([~enough, still, exponential[1] >= power[1]], [0, 1, 2], 3)
    dims = [str(d) for d in y.dims[1:]]
    shared: dict[str, Any] = {"units": "1", "source": FIXED_POINTS + "; comparison of laws ours",
                              "coords": {name: c for name, c in y.coords.items() if set(c.dims) <= set(dims)}}
    slope = "least-squares slope of log ‖X_k − X*‖/‖X*‖ against {}, at loops k where it is above " + f"{floor:g}"
    variables = {"law": measurement(law, dims, long_name="law of the distance over loops",
                                    definition="the law of larger R²: " + ", ".join(LAWS), **shared)}
    variables["law"].attrs |= {"flag_values": list(range(len(LAWS))), "flag_meanings": " ".join(LAWS)}
    for name, against, (found, r2, _) in (("exponential", "loop k", exponential), ("power", "log(k + 1)", power)):
        variables[name] = measurement(np.where(still, 0.0, found), dims, long_name=f"slope ({name} law)",
                                      definition=slope.format(against), **shared)
        variables[f"{name}_r2"] = measurement(np.where(still, 1.0, r2), dims, long_name=f"R² ({name} law)",
                                              definition="1 − squared residuals / squared deviations from the mean, of "
                                                         "log distance", **shared)
    variables["r2"] = measurement(np.where(law == 3, variables["power_r2"], variables["exponential_r2"]), dims,
                                  long_name="R² of the better law", definition="R² of the law that `law` names",
                                  **shared)
    return xr.Dataset(variables)


CONSTANT = 1e-10
"""Mean squared deviation of log distance (or relative one of a norm) below which nothing changes but by rounding."""


def growth(norm: xr.DataArray) -> xr.Dataset:
    """Does the state grow by the same amount in every loop? Fitted over the later half of the loops, at least 3.

    ``norm`` is ‖X_k‖ over a ``loop`` axis, which goes. ``per_loop`` is the slope against the loop [units of the
    residual stream per loop], ``r2`` its fit (1 where the norm does not change), and ``steady`` says that R² is at
    least `STEADY_FIT` and the growth over these loops at least `STEADY_SHARE` of the last norm: there is **no fixed
    point** as far as the loops go, and only the direction can settle. Ours. Raises ValueError for fewer than 3 loops.
    """
    y = norm.transpose("loop", ...)
    if len(y) < 3:
        raise ValueError(f"growth is judged over at least 3 loops, there are {len(y)}.")
    values = y.to_numpy().astype(float)[min(len(y) // 2, len(y) - 3):]
    k = np.arange(len(values), dtype=float).reshape(-1, *(1,) * (values.ndim - 1))
    size = np.maximum(np.abs(values).max(0), 1e-30)
    slope, r2, deviation = _line(k, values / size, np.ones(values.shape, dtype=bool))
    still = deviation <= CONSTANT
    slope, r2 = np.where(still, 0.0, slope * size), np.where(still, 1.0, r2)
    steady = (r2 >= STEADY_FIT) & (slope * (len(values) - 1) >= STEADY_SHARE * values[-1]) & (slope > 0)
    dims = [str(d) for d in y.dims[1:]]
    over = f"over the last {len(values)} loops"
    shared: dict[str, Any] = {"source": "ours", "coords": {
        name: c for name, c in y.coords.items() if set(c.dims) <= set(dims)}}
    return xr.Dataset({
        "per_loop": measurement(slope, dims, long_name="growth of the state per loop", units="1",
                                definition=f"least-squares slope of ‖X_k‖ against k, {over}", **shared),
        "r2": measurement(r2, dims, long_name="R² of steady growth", units="1",
                          definition=f"R² of ‖X_k‖ against k, {over}", **shared),
        "steady": measurement(steady, dims, long_name="the state grows by the same amount in every loop", units="1",
                              definition=f"R² ≥ {STEADY_FIT} and growth {over} ≥ {STEADY_SHARE:.0%} of the last norm",
                              **shared)})


def classify_tokens(residual: xr.DataArray, topology: Topology, *, fixed_point: xr.DataArray | None = None,
                    threshold: float = 0.99, window: int = 3, max_period: int = 4) -> xr.Dataset:
    """Does each token's state, at each looped layer, settle, cycle or drift? Over (layer, batch, pos).

    - *direction settled*: cos(X_k, X*) ≥ ``threshold`` at each of the last ``window`` loops. Layers read directions,
      but this is no fixed point: a state that grows by the same vector in every loop has a settled direction;
    - *state settled*: the direction is settled, ‖X_k − X*‖ / ‖X*‖ ≤ √(2 − 2 ``threshold``) there too (the same
      distance, with the length), and the state does not grow steadily (`growth`);
    - *cyclic*: not settled, and for a period p in 2..``max_period`` cos(X_k, X_(k−p)) is at least ``threshold``
      and above cos(X_k, X_(k−1)) (a slow drift is nearest to the loop before) at each of the last ``window`` loops;
      ``period`` holds the smallest such p (1 if settled, 0 if drifting);
    - *drifting*: none of these.

    X* is ``fixed_point``, or else the last recorded loop, with the window just before it. ``token_class`` holds an
    index of `TOKEN_CLASSES` (attributes flag_values, flag_meanings); ``growth`` [per loop], ``growth_r2`` and
    ``grows_steadily`` are those of `growth`. After 2604.11791, with the thresholds stated here. Raises ValueError
    if there are too few loops, max(window + 1, window + max_period), or states are not finite.
    """
    needed = window + max(1, max_period)
    if topology.n_loops < needed:
        raise ValueError(f"a window of {window} loops and periods up to {max_period} need a recording of at least "
                         f"{needed} loops, this one has {topology.n_loops}: record more, or lower them.")
    x = states_by_loop(residual, topology)
    if fixed_point is not None:
        seen, target = x[-window:], _matching(fixed_point, x, topology)[None]
    else:
        seen, target = x[-window - 1:-1], x[-1:]
    direction = (_likeness(seen, target) >= threshold).all(0)
    apart, size = _norm(seen - target), _norm(target)
    grown = growth(xr.DataArray(_norm(x), dims=("loop", "layer", "batch", "pos")))
    steady = grown.steady.to_numpy()
    rest = direction & (apart <= (2 - 2 * threshold) ** 0.5 * size + 1e-12).all(0) & ~steady
    period = np.where(direction, 1, 0)
    before = _likeness(x[-window:], x[-window - 1:-1])
    for p in range(2, max_period + 1):
        back = _likeness(x[-window:], x[-window - p:len(x) - p])
        period = np.where((period == 0) & ((back >= threshold) & (back > before)).all(0), p, period)
    token_class = np.select([rest, direction, period > 1], [3, 2, 1], 0)
    coords = {name: c for name, c in cycle_coords(residual, topology).items() if name != "loop"}
    rule = (f"direction settled: cos(X_k, X*) ≥ {threshold} in the last {window} loops; state settled: moreover "
            f"‖X_k − X*‖ ≤ {(2 - 2 * threshold) ** 0.5:.2g} ‖X*‖ there, and no steady growth; cyclic: "
            f"cos(X_k, X_(k−p)) ≥ {threshold} and above cos(X_k, X_(k−1)) there for a p in 2..{max_period}; drifting: "
            "none of these")
    shared: dict[str, Any] = {"units": "1", "definition": rule, "source": FIXED_POINTS + "; thresholds ours",
                              "coords": coords}
    dims = ("layer", "batch", "pos")
    classes = measurement(token_class, dims, long_name="class of a token's state over loops", **shared)
    classes.attrs |= {"flag_values": list(range(len(TOKEN_CLASSES))), "flag_meanings": " ".join(TOKEN_CLASSES)}
    variables = {"token_class": classes,
                 "period": measurement(period, dims, long_name="period of a token's state [loop]", **shared)}
    for name, of in (("growth", "per_loop"), ("growth_r2", "r2"), ("grows_steadily", "steady")):
        variables[name] = grown[of].assign_coords(coords)
    return xr.Dataset(variables)


def trajectory_pca(residual: xr.DataArray, n_components: int = 3) -> xr.Dataset:
    """Principal components of all states of all depths, examples and positions together.

    ``coordinates`` (depth, batch, pos, component), ``explained_variance`` and ``explained_variance_ratio``
    (component), ``components`` (component, d_model; the loading of largest size is positive) and ``mean``
    (d_model). Equals scikit-learn's PCA on the flattened states. Constant states have no variance,
    and ratios of 0. Raises ValueError for more components than d_model, one state only, or states that are not finite.
    """
    ordered = residual.transpose("depth", "batch", "pos", "d_model")
    x = ordered.to_numpy().astype(np.float64)
    flat = x.reshape(-1, x.shape[-1])
    if not 1 <= n_components <= min(flat.shape):
        raise ValueError(f"n_components must be between 1 and {min(flat.shape)} here, not {n_components}.")
    if len(flat) < 2:
        raise ValueError("principal components need at least two states, there is 1.")
    check_finite(flat, "the residual stream")
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
        "explained_variance_ratio": measurement(variance[:n_components] / max(variance.sum(), 1e-300), ("component",),
                                                long_name="share of variance explained",
                                                definition="variance of the coordinates / total variance", **shared),
        "components": measurement(components, ("component", "d_model"), long_name="principal direction",
                                  definition="eigenvector of the covariance of states", **shared),
        "mean": measurement(mean, ("d_model",), long_name="mean state", definition="mean over depth, batch and pos",
                            units="1", source=source)})


def effective_rank(x: xr.DataArray, *, over: tuple[str, ...] = ("batch", "pos")) -> xr.DataArray:
    """exp of the entropy of σ_i / Σσ, σ the singular values of the [over, d_model] matrix; between 1 and d_model.

    The other axes of ``x`` (depth, say) remain. Not centred; 0 where all states are 0. Raises ValueError for states
    that are not finite. Source: Roy & Vetterli 2007.
    """
    sigma = np.sqrt(_squared_singular_values(x, over))
    return _of_spectrum(x, over, np.where(sigma.any(-1), np.exp(_entropy(sigma)), 0.0), long_name="effective rank",
                        units="1", definition="exp of −Σ p log p with p_i = σ_i / Σσ, singular values of the states",
                        source="Roy & Vetterli 2007")


def matrix_entropy(x: xr.DataArray, *, over: tuple[str, ...] = ("batch", "pos")) -> xr.DataArray:
    """−Σ p_i log p_i [nat] with p_i = σ_i² / Σσ², of the [over, d_model] matrix of states; the other axes remain.

    Not centred; 0 where all states are 0. Raises ValueError for states that are not finite. Source: 2510.06477.
    """
    return _of_spectrum(x, over, _entropy(_squared_singular_values(x, over)), long_name="matrix entropy", units="nat",
                        definition="−Σ p log p with p_i = σ_i² / Σσ², singular values of the states",
                        source="arXiv 2510.06477")


# ---------------------------------------------------------------------- private

def states_by_loop(residual: xr.DataArray, topology: Topology) -> Shaped[np.ndarray, "loop layer batch pos d_model"]:
    """The looped layers' states, loop by loop."""
    if residual.sizes.get("depth") != topology.depth:
        raise ValueError(f"the residual stream has {residual.sizes.get('depth')} depths and the topology "
                         f"{topology.depth}: take both from the same recording (rec.residual_stream(), rec.topology).")
    x = residual.transpose("depth", "batch", "pos", "d_model").to_numpy()
    x = x[topology.n_head:topology.n_head + topology.n_loops * topology.n_mid]
    check_finite(x, "the residual stream")
    return x.reshape(topology.n_loops, topology.n_mid, *x.shape[1:])


def cycle_coords(residual: xr.DataArray, topology: Topology) -> dict[Any, Any]:
    kept = {name: c for name, c in residual.coords.items() if c.dims and set(c.dims) <= {"batch", "pos"}}
    return {"loop": np.arange(topology.n_loops), "layer": topology.n_head + np.arange(topology.n_mid), **kept}


def _matching(fixed_point: xr.DataArray, x: np.ndarray, topology: Topology) -> np.ndarray:
    target = fixed_point.transpose("layer", "batch", "pos", "d_model").to_numpy()
    if target.shape != x.shape[1:]:
        raise ValueError(f"the fixed point has shape {target.shape}, the looped layers' states {x.shape[1:]}: "
                         f"compute it for the same examples and the {topology.n_mid} looped layers.")
    check_finite(target, "the fixed point")
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


def _likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine; 1 for two states of norm 0, and 0 for one of them beside another state."""
    return np.nan_to_num(_cosine(a, b), nan=0.0) + ((_norm(a) == 0) & (_norm(b) == 0))


def _line(x: Shaped[np.ndarray, "loop *ones"], y: Shaped[np.ndarray, "loop *rest"],
          used: Shaped[np.ndarray, "loop *rest"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, R² and mean squared deviation of y, each [*rest], of a line through the used points; NaN for under 3."""
    n = used.sum(0)
    enough, count = n >= 3, np.maximum(n, 1)
    x_off = np.where(used, x - (x * used).sum(0) / count, 0.0)
    y_off = np.where(used, y - (y * used).sum(0) / count, 0.0)
    spread, total = (x_off ** 2).sum(0), (y_off ** 2).sum(0)
    slope = (x_off * y_off).sum(0) / np.where(enough, spread, 1.0)
    r2 = 1 - ((y_off - slope * x_off) ** 2).sum(0) / np.where(total > 0, total, 1.0)
    return np.where(enough, slope, np.nan), np.where(enough, r2, np.nan), total / count


def _squared_singular_values(x: xr.DataArray, over: tuple[str, ...]) -> np.ndarray:
    """[..., d_model], from the d_model × d_model Gram matrix in float64: its size does not grow with examples."""
    kept = [d for d in x.dims if d not in over and d != "d_model"]
    values = x.transpose(*kept, *over, "d_model").to_numpy().astype(np.float64)
    check_finite(values, "the states")
    values = values.reshape(*(x.sizes[d] for d in kept), -1, x.sizes["d_model"])
    return np.linalg.eigvalsh(np.swapaxes(values, -1, -2) @ values).clip(min=0)


def _entropy(weights: np.ndarray) -> np.ndarray:
    p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def _of_spectrum(x: xr.DataArray, over: tuple[str, ...], values: np.ndarray, **attributes: str) -> xr.DataArray:
    dims = [str(d) for d in x.dims if d not in over and d != "d_model"]
    coords = {name: c for name, c in x.coords.items() if set(c.dims) <= set(dims)}
    return measurement(values, dims, coords=coords, **attributes)
