"""Geometry: trajectories whose steps, angles, fixed points and dimensions are known, and scikit-learn's PCA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.decomposition import PCA

from hooks import Topology
from probes import (
    classify_tokens,
    contraction,
    dynamics,
    effective_rank,
    fixed_point,
    matrix_entropy,
    trajectory_pca,
)
from probes.geometry import LAWS, TOKEN_CLASSES, growth
from tests.small import small_model, small_tokens

D = 6


def residual_of(state: Callable[[int, int], np.ndarray], topology: Topology) -> xr.DataArray:
    """A residual stream whose state at (layer, loop) is ``state`` [batch, pos, d_model]; loop −1 outside the cycle."""
    layers, loops = zip(*topology.unrolled(), strict=True)
    loops = tuple(-1 if k is None else k for k in loops)
    x = np.stack([state(layer, k) for layer, k in zip(layers, loops, strict=True)])
    return xr.DataArray(x, dims=("depth", "batch", "pos", "d_model"),
                        coords={"depth": range(len(x)), "layer": ("depth", list(layers)),
                                "loop": ("depth", list(loops))})


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def recorded(n_loops: int = 5) -> tuple[xr.DataArray, Topology]:
    with torch.no_grad():
        _, rec = small_model().run_with_cache(small_tokens(), n_loops, names_filter="blocks.*.hook_resid_post")
    assert rec.topology is not None
    return rec.residual_stream(), rec.topology


def test_dynamics_are_their_definitions_at_the_same_layer_one_loop_apart() -> None:
    residual, topology = recorded()
    target = fixed_point(small_model(), small_tokens(), n_loops=20)
    moves = dynamics(residual, topology, fixed_point=target)
    assert dict(moves.sizes) == {"loop": 5, "layer": 2, "batch": 3, "pos": 9}
    assert moves.layer.values.tolist() == [1, 2]

    def state(k: int, layer: int) -> np.ndarray:
        at = np.flatnonzero((residual.layer == layer) & (residual.loop == k))
        return residual.values[at[0], 1, 4].astype(float)

    for layer in (1, 2):
        here = moves.sel(layer=layer).isel(batch=1, pos=4)
        for k in range(2, 5):
            x = [state(k - i, layer) for i in range(3)]
            step, before = x[0] - x[1], x[1] - x[2]
            unit = [v / np.linalg.norm(v) for v in x]
            unit_step, unit_before = unit[0] - unit[1], unit[1] - unit[2]
            at = here.sel(loop=k)
            np.testing.assert_allclose(at.step_norm, np.linalg.norm(step), rtol=1e-4)
            np.testing.assert_allclose(at.step_relative, np.linalg.norm(step) / np.linalg.norm(x[1]), rtol=1e-4)
            np.testing.assert_allclose(at.acceleration, np.linalg.norm(step - before), rtol=1e-3)
            for name, a, b in (("step_cosine", step, before), ("step_cosine_unit", unit_step, unit_before)):
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                np.testing.assert_allclose(at[name], cosine, atol=1e-3)
            goal = target.sel(layer=layer).values[1, 4]
            np.testing.assert_allclose(at.distance_to_fixed_point,
                                       np.linalg.norm(x[0] - goal) / np.linalg.norm(goal), rtol=1e-4)


def test_what_is_not_defined_yet_is_nan_and_nothing_else_is() -> None:
    residual, topology = recorded()
    moves = dynamics(residual, topology)
    first_loop = {"step_norm": 1, "step_relative": 1, "step_cosine": 2, "step_cosine_unit": 2, "acceleration": 2}
    assert set(moves.data_vars) == set(first_loop)
    for name, first in first_loop.items():
        assert np.isnan(moves[name][:first]).all()
        assert np.isfinite(moves[name][first:]).all()
    single = dynamics(*recorded(1))
    assert np.isnan(single.step_norm).all()
    assert np.isnan(single.acceleration).all()


def test_a_straight_line_a_zigzag_and_a_turn_of_60_degrees() -> None:
    topology = Topology(1, 2, 1, 6)
    u, v = np.eye(D)[0], np.eye(D)[1]

    def ones(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (2, 3, D))

    line = dynamics(residual_of(lambda layer, k: ones((2.0 + k) * u + layer * v), topology), topology)
    np.testing.assert_allclose(line.step_cosine[2:], 1, atol=1e-6)
    np.testing.assert_allclose(line.acceleration[2:], 0, atol=1e-6)
    np.testing.assert_allclose(line.step_norm[1:], 1, rtol=1e-6)
    zigzag = dynamics(residual_of(lambda layer, k: ones(3 * u + (-1) ** k * v), topology), topology)
    np.testing.assert_allclose(zigzag.step_cosine[2:], -1, atol=1e-6)
    np.testing.assert_allclose(zigzag.acceleration[2:], 4, rtol=1e-6)
    angle = np.pi / 3
    hexagon = dynamics(residual_of(lambda layer, k: ones(np.cos(k * angle) * u + np.sin(k * angle) * v), topology),
                       topology)
    np.testing.assert_allclose(hexagon.step_cosine[2:], 0.5, atol=1e-6)
    np.testing.assert_allclose(hexagon.step_cosine_unit[2:], 0.5, atol=1e-6)
    growing = dynamics(residual_of(lambda layer, k: ones(2.0 ** k * u), topology), topology)
    np.testing.assert_allclose(growing.step_cosine[2:], 1, atol=1e-6)   # an outward move …
    assert np.isnan(growing.step_cosine_unit[2:]).all()                  # … that turns nowhere


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1])
def test_a_linear_contraction_has_its_factor(factor: float) -> None:
    topology = Topology(1, 2, 1, 10)
    goal, offset = noise(0, 2, 2, 3, D), noise(1, 2, 2, 3, D)
    residual = residual_of(lambda layer, k: goal[layer % 2] + factor ** k * offset[layer % 2], topology)
    target = xr.DataArray(np.stack([goal[1], goal[0]]), dims=("layer", "batch", "pos", "d_model"))
    distance = dynamics(residual, topology, fixed_point=target).distance_to_fixed_point
    fitted = contraction(distance)
    assert fitted.exponential.dims == ("layer", "batch", "pos")
    np.testing.assert_allclose(np.exp(fitted.exponential), factor, rtol=1e-4)
    assert (fitted.law == LAWS.index("exponential")).all()
    np.testing.assert_allclose(fitted.r2, 1, atol=1e-6)
    assert (fitted.power_r2 < 0.98).all()


@pytest.mark.parametrize("exponent", [-0.5, -1.0, -2.0])
def test_a_power_law_has_its_exponent_and_is_no_contraction(exponent: float) -> None:
    loops = np.arange(12)
    distance = xr.DataArray((loops[:, None] + 1.0) ** exponent * np.array([1.0, 3.0]), dims=("loop", "pos"),
                            coords={"loop": loops})
    fitted = contraction(distance)
    assert (fitted.law == LAWS.index("power")).all()
    np.testing.assert_allclose(fitted.power, exponent, rtol=1e-6)
    np.testing.assert_allclose(fitted.r2, 1, atol=1e-9)
    assert (fitted.exponential_r2 < 0.97).all()


def test_the_loop_numbers_of_a_recording_count_not_their_order() -> None:
    distance = xr.DataArray((np.arange(4, 12) + 1.0)[:, None] ** -1.0, dims=("loop", "pos"),
                            coords={"loop": np.arange(4, 12)})
    np.testing.assert_allclose(contraction(distance).power, -1, rtol=1e-6)


def test_a_distance_that_does_not_change_is_constant() -> None:
    fitted = contraction(xr.DataArray(np.full((6, 1), 0.3), dims=("loop", "pos")))
    assert LAWS[int(fitted.law[0])] == "constant"
    assert (float(fitted.exponential[0]), float(fitted.power[0]), float(fitted.r2[0])) == (0, 0, 1)


def test_a_state_that_grows_by_the_same_vector_has_a_settled_direction_and_no_fixed_point() -> None:
    """Its direction settles as 1/k: a power law, steady growth, and never a settled state."""
    topology, step = Topology(0, 1, 0, 32), 3 * np.eye(D)[0]
    start, rest = noise(0, 1, 3, D), noise(1, 1, 3, D)

    def state(layer: int, k: int) -> np.ndarray:
        x = start + k * step
        x[:, 1] = rest[:, 1] + 0.5 ** k * start[:, 1]                    # position 1 comes to rest
        x[:, 2] = 1.1 ** k * rest[:, 2]                                  # position 2 grows, and not by the same amount
        return x

    residual = residual_of(state, topology)
    classes = classify_tokens(residual, topology).isel(layer=0, batch=0)
    assert [TOKEN_CLASSES[c] for c in classes.token_class.values] == ["direction_settled", "state_settled",
                                                                      "direction_settled"]
    assert classes.grows_steadily.values.tolist() == [True, False, False]
    assert float(classes.growth[0]) == pytest.approx(3, rel=1e-3)
    assert abs(float(classes.growth[1])) < 1e-3
    x = residual.values.reshape(32, 1, 1, 3, D)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    fitted = contraction(xr.DataArray(np.linalg.norm(unit - np.eye(D)[0], axis=-1)[4:, 0, 0],
                                      dims=("loop", "pos"), coords={"loop": np.arange(4, 32)})).isel(pos=0)
    assert LAWS[int(fitted.law)] == "power"
    assert float(fitted.power) == pytest.approx(-1, abs=0.1)
    assert float(fitted.r2) > 0.99 > float(fitted.exponential_r2)


def test_growth_is_fitted_over_the_later_half_and_needs_three_loops() -> None:
    norm = xr.DataArray(np.concatenate([np.full(6, 50.0), 10 + 2.0 * np.arange(6)])[:, None], dims=("loop", "pos"))
    found = growth(norm)
    assert float(found.per_loop[0]) == pytest.approx(2)
    assert bool(found.steady[0])
    assert not bool(growth(-norm + 100).steady[0]), "a norm that falls does not grow"
    slight = xr.DataArray(100 + 0.01 * np.arange(12)[:, None], dims=("loop", "pos"))
    assert float(growth(slight).r2[0]) == pytest.approx(1)
    assert not bool(growth(slight).steady[0]), "growth of 0.05% over the loops looked at is none"
    with pytest.raises(ValueError, match="at least 3 loops, there are 2"):
        growth(norm[:2])


def test_contraction_leaves_out_rounding_and_says_nan_where_too_little_is_left() -> None:
    loops = np.arange(8)
    distance = xr.DataArray(np.stack([np.maximum(0.1 ** loops, 3e-7), np.where(loops < 2, 1.0, 0.0)], axis=1),
                            dims=("loop", "pos"), coords={"loop": loops})
    fitted = contraction(distance)
    np.testing.assert_allclose(fitted.exponential[0], np.log(0.1), rtol=1e-5)
    assert np.isnan(fitted.exponential[1])
    assert [LAWS[law] for law in fitted.law.values] == ["exponential", "undefined"]


def test_the_fixed_point_is_the_state_after_many_loops() -> None:
    model, noised = small_model(), small_tokens()
    goal = fixed_point(model, noised, n_loops=12)
    with torch.no_grad():
        _, rec = model.run_with_cache(noised, 12, names_filter="blocks.*.hook_resid_post")
    assert rec.topology is not None
    for i, layer in enumerate((1, 2)):
        np.testing.assert_array_equal(goal[i], rec[f"blocks.{layer}.hook_resid_post@11"])
    moves = dynamics(rec.residual_stream(), rec.topology, fixed_point=goal)
    np.testing.assert_array_equal(moves.distance_to_fixed_point[-1], 0)
    np.testing.assert_allclose(goal.last_step, moves.step_relative[-1], rtol=1e-4)
    with pytest.raises(ValueError, match="n_loops must be at least 2"):
        fixed_point(model, noised, n_loops=1)


@pytest.mark.parametrize("given", [True, False])
def test_tokens_that_converge_cycle_and_drift_are_told_apart(given: bool) -> None:
    topology = Topology(0, 1, 0, 12)
    goal = noise(0, 1, 5, D)
    walk, spots = noise(1, 12, D), noise(2, 3, D)

    def state(layer: int, k: int) -> np.ndarray:
        x = goal + 0.3 ** k * noise(3, 1, 5, D)                       # position 0 converges
        x[0, 1], x[0, 2], x[0, 3] = spots[k % 2], spots[k % 3], walk[k]
        x[0, 4] = walk[0] + (k - 20) * 0.02 * walk[1]                 # a slow drift: near to itself at every lag
        return x

    residual = residual_of(state, topology)
    target = xr.DataArray(goal[None], dims=("layer", "batch", "pos", "d_model"))
    classes = classify_tokens(residual, topology, fixed_point=target if given else None)
    drift = 0 if given else 3  # without X*, a drift this slow cannot be told from having arrived
    assert classes.token_class.values[0, 0].tolist() == [3, 1, 1, 0, drift]
    assert classes.period.values[0, 0].tolist() == [1, 2, 3, 0, drift // 3]
    assert classes.token_class.attrs["flag_meanings"].split() == list(TOKEN_CLASSES)
    assert "0.99" in classes.token_class.attrs["definition"]


def test_pca_agrees_with_scikit_learn() -> None:
    residual, _ = recorded()
    ours = trajectory_pca(residual, 4)
    flat = residual.values.reshape(-1, residual.sizes["d_model"]).astype(float)
    theirs = PCA(4, svd_solver="full").fit(flat)
    np.testing.assert_allclose(ours.explained_variance, theirs.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_, rtol=1e-5)
    signs = np.sign((ours.components.values * theirs.components_).sum(1))
    np.testing.assert_allclose(ours.components, theirs.components_ * signs[:, None], atol=1e-4)
    expected = (theirs.transform(flat) * signs).reshape(*residual.shape[:3], 4)
    np.testing.assert_allclose(ours.coordinates, expected, atol=1e-3)
    np.testing.assert_array_equal(ours.coordinates.loop, residual.loop)
    every = trajectory_pca(residual, residual.sizes["d_model"])
    rebuilt = every.coordinates.values @ every.components.values + every["mean"].values
    np.testing.assert_allclose(rebuilt, residual, atol=1e-3)
    with pytest.raises(ValueError, match="n_components must be between 1 and 16"):
        trajectory_pca(residual, 17)


def test_spectra_of_known_matrices() -> None:
    q, _ = np.linalg.qr(noise(0, 12, D))                                # orthonormal columns: all σ equal
    one = np.outer(noise(1, 12), noise(2, D))                            # a single σ
    three = q * np.array([1, 1, 1, 0, 0, 0])
    two_to_one = q * np.array([2, 1, 0, 0, 0, 0])
    x = xr.DataArray(np.stack([q, one, three, two_to_one]).reshape(4, 3, 4, D),
                     dims=("depth", "batch", "pos", "d_model"), coords={"depth": range(4)})

    def entropy(*weights: float) -> float:
        p = np.array(weights) / sum(weights)
        return float(-(p * np.log(p)).sum())

    np.testing.assert_allclose(effective_rank(x), [6, 1, 3, np.exp(entropy(2, 1))], rtol=1e-4)
    np.testing.assert_allclose(matrix_entropy(x), [np.log(6), 0, np.log(3), entropy(4, 1)], atol=1e-5)
    assert effective_rank(x).dims == ("depth",)
    assert effective_rank(x, over=("pos",)).dims == ("depth", "batch")


def test_spectra_agree_with_a_plain_singular_value_decomposition() -> None:
    residual, _ = recorded()
    for depth in (0, 5):
        sigma = np.linalg.svd(residual.values[depth].reshape(-1, 16).astype(float), compute_uv=False)
        p, p2 = sigma / sigma.sum(), sigma ** 2 / (sigma ** 2).sum()
        np.testing.assert_allclose(effective_rank(residual)[depth], np.exp(-(p * np.log(p)).sum()), rtol=1e-4)
        np.testing.assert_allclose(matrix_entropy(residual)[depth], -(p2 * np.log(p2)).sum(), rtol=1e-4)


def test_states_that_do_not_belong_together_are_refused() -> None:
    residual, topology = recorded()
    with pytest.raises(ValueError, match="take both from the same recording"):
        dynamics(residual, Topology(1, 2, 1, 6))
    with pytest.raises(ValueError, match="compute it for the same examples"):
        dynamics(residual, topology, fixed_point=fixed_point(small_model(), small_tokens(batch=2), n_loops=3))
    with pytest.raises(ValueError, match="at least 7 loops, this one has 5"):
        classify_tokens(residual, topology)
