"""Likeness of depths, periods and dimensions: independent references and planted answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.linalg import orthogonal_procrustes

from hooks.topology import Topology
from probes.dimension import intrinsic_dimension
from probes.intervals import jackknife
from probes.periods import periods
from probes.similarity import between_depths, cka_between_depths
from tests.small import MASK, small_model


def stream(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("depth", "batch", "pos", "d_model"))


RNG = np.random.default_rng(0)


def test_procrustes_is_scipys_and_sees_rotations() -> None:
    x = RNG.normal(size=(1, 30, 4, 6))
    turn = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    y = np.stack([3 * x[0] @ turn + 2, RNG.normal(size=(30, 4, 6)), x[0] ** 3])
    found = between_depths(stream(x), stream(y), kind="procrustes")
    for i in range(3):
        a, b = (v.reshape(-1, 6) - v.reshape(-1, 6).mean(0) for v in (x[0], y[i]))
        _, scale = orthogonal_procrustes(a / np.linalg.norm(a), b / np.linalg.norm(b))
        assert float(found.value[0, i]) == pytest.approx(scale, rel=1e-9)
    assert float(found.value[0, 0]) == pytest.approx(1)
    assert float(found.value[0, 1]) < 0.4


def test_cosine_is_of_states_less_their_mean() -> None:
    x = RNG.normal(size=(2, 10, 3, 5)) + 50
    found = between_depths(stream(x), kind="cosine")
    a, b = (v - v.mean((0, 1)) for v in x)
    each = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert float(found.value[0, 1]) == pytest.approx(each.mean(), rel=1e-9)
    assert abs(float(found.value[0, 1])) < 0.4                       # without the mean taken off it would be .999
    np.testing.assert_allclose(np.diagonal(found.value), 1)


def test_examples_are_units_of_cka_and_intervals_leave_examples_out() -> None:
    shared = RNG.normal(size=(40, 1, 4))
    x = np.stack([np.repeat(shared, 6, 1) + 0.1 * RNG.normal(size=(40, 6, 4)) for _ in range(2)])
    by_example = between_depths(stream(x), units="example")
    flat = stream(x.reshape(2, 40, 1, -1))
    np.testing.assert_allclose(by_example.value, cka_between_depths(flat), rtol=1e-9)
    by_position = between_depths(stream(x), units="position")
    np.testing.assert_allclose(by_position.value, cka_between_depths(stream(x)), rtol=1e-9)
    unrelated = between_depths(stream(RNG.normal(size=(2, 40, 6, 4))))
    assert float(unrelated.low[0, 1]) < 0 < float(unrelated.high[0, 1])
    assert float(by_example.low[0, 1]) > 0.9


def test_the_jackknifes_interval_is_a_means() -> None:
    """Of a mean, with every example its own group, the variance is s²/n exactly."""
    values = RNG.normal(size=20)
    value, low, high = jackknife(lambda index: values[index].mean(), 20, groups=20)
    half = 1.959964 * values.std(ddof=1) / np.sqrt(20)
    np.testing.assert_allclose([value, low, high], [values.mean(), values.mean() - half, values.mean() + half])


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_a_planted_dimension_is_found_in_a_curved_cloud(dimension: int) -> None:
    hidden = RNG.uniform(size=(100, 10, dimension))
    lift = RNG.normal(size=(dimension, 12))
    x = np.concatenate([np.sin(3 * hidden @ lift), hidden @ lift], -1)
    found = intrinsic_dimension(stream(x[None]))
    assert float(found.value[0]) == pytest.approx(dimension, rel=0.15)
    assert float(found.low[0]) < float(found.value[0]) < float(found.high[0])
    again = intrinsic_dimension(stream(np.concatenate([x, x], 1)[None]))
    assert float(again.value[0]) == pytest.approx(float(found.value[0]))       # a state that is there twice counts once


TOPOLOGY = Topology(1, 1, 0, 24)


def looping(path: np.ndarray) -> xr.DataArray:
    """[loop, d] as the stream of one example, with a head layer before."""
    states = np.concatenate([np.zeros((1, path.shape[-1])), path])
    return stream(states[:, None, None].astype(np.float32))


@pytest.mark.parametrize("period", [3.0, 4.5, 8.0])
def test_a_limit_cycle_is_found_with_its_period(period: float) -> None:
    k = np.arange(24)
    angle = 2 * np.pi * k / period
    basis = np.linalg.qr(RNG.normal(size=(9, 3)))[0]
    path = np.stack([np.cos(angle), np.sin(angle), 0.02 * RNG.normal(size=24)], -1) @ basis.T
    drift = 0.3 * k[:, None] * basis[:, 2]
    found = periods(looping(path), TOPOLOGY)
    assert float(found.period.squeeze()) == pytest.approx(period, rel=0.04)
    assert float(found.power.squeeze()) > 0.85
    assert float(found.winding.squeeze()) == pytest.approx(23 / period, rel=0.05)
    assert float(periods(looping(path + drift), TOPOLOGY).period.squeeze()) == pytest.approx(period, rel=0.05)


def test_what_does_not_turn_has_no_period() -> None:
    k = np.arange(24.0)[:, None]
    line = periods(looping(k * np.ones((1, 5)) + 3), TOPOLOGY)
    assert all(np.isnan(line[name]).all() for name in line)
    walks = [periods(looping(np.cumsum(np.random.default_rng(seed).normal(size=(24, 40)), 0)), TOPOLOGY)
             for seed in range(10)]
    apart = [float((w.power - w.chance_power).squeeze()) for w in walks]
    assert abs(np.mean(apart)) < 0.1
    slowing = (1 - 0.7 ** k) * RNG.normal(size=5) + (1 - 0.9 ** k) * RNG.normal(size=5)
    arc = np.concatenate([np.cos(k / 8), np.sin(k / 8)], -1)                 # 3 radians: less than half a turn
    for path in (slowing, arc):
        assert float(periods(looping(path), TOPOLOGY).power.squeeze()) < 0.25
    with pytest.raises(ValueError, match="at least 6 loops, and 4 are left"):
        periods(looping(k * np.ones((1, 5))), TOPOLOGY, skip=20)


def test_real_recordings_are_taken() -> None:
    model = small_model(seed=2)
    tokens = torch.randint(0, MASK, (12, 6), generator=torch.Generator().manual_seed(3))
    _, rec = model.run_with_cache(tokens, 8, names_filter="blocks.*.hook_resid_post")
    residual = rec.residual_stream()
    assert periods(residual, rec.topology).period.shape == (2, 12, 6)
    assert np.isfinite(intrinsic_dimension(residual).value).all()
    for kind in ("cka", "procrustes", "cosine"):
        found = between_depths(residual, kind=kind)
        np.testing.assert_allclose(np.diagonal(found.value), 1, rtol=1e-6)
        np.testing.assert_allclose(found.value, found.value.values.T, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 5"):
        between_depths(residual.isel(batch=slice(0, 3)))
    with pytest.raises(ValueError, match="between vectors of one width"):
        between_depths(residual, residual.isel(d_model=slice(0, 4)), kind="cosine")
