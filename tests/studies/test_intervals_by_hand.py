"""Intervals hold 95% and resample what belongs together: against scipy, against exact answers, against themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from probes import probe_latent
from probes.intervals import bootstrap
from studies.questions.claims.judge import quantity
from tests.small import MASK, small_model


@pytest.mark.parametrize("make", [lambda rng: rng.normal(size=200), lambda rng: rng.exponential(size=200),
                                  lambda rng: (rng.random(200) < 0.3).astype(float)], ids=["normal", "skewed", "hits"])
def test_a_bootstrap_interval_is_the_one_of_scipy(make: object) -> None:
    values = make(np.random.default_rng(3))  # type: ignore[operator]
    ours = bootstrap(np.mean, values, n_resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, confidence_level=0.95, n_resamples=20_000, method="percentile",
                             rng=np.random.default_rng(0)).confidence_interval
    near = 0.05 * (theirs.high - theirs.low)   # an interval of 90% is by .08 of that narrower at each end
    assert ours.low == pytest.approx(theirs.low, abs=near)
    assert ours.high == pytest.approx(theirs.high, abs=near)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert ours.high - ours.low == pytest.approx(2 * half, rel=0.06)


def test_the_claims_interval_over_examples_is_the_one_of_scipy() -> None:
    values = np.random.default_rng(4).normal(size=300)
    ours = quantity("x", xr.DataArray(values[None], dims=("seed", "example")))
    theirs = stats.bootstrap((values,), np.mean, confidence_level=0.95, n_resamples=20_000, method="percentile",
                             rng=np.random.default_rng(0)).confidence_interval
    near = 0.05 * (theirs.high - theirs.low)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=near)


def test_samples_of_the_same_examples_are_resampled_together() -> None:
    a = np.random.default_rng(0).normal(size=100)
    paired = bootstrap(lambda x, y: float((y - x).mean()), a, a + 1)
    assert (paired.low, paired.high) == pytest.approx((1, 1)), "examples differ, their differences do not"
    ratio = bootstrap(lambda x, y, z: float((x / y + z.mean(1)).mean()), a, 2 * a,
                      np.zeros((100, 3)))
    assert (ratio.low, ratio.high) == pytest.approx((0.5, 0.5))
    correlation = bootstrap(lambda x, y: float(np.corrcoef(x, y)[0, 1]), a, -a)
    assert correlation.high == pytest.approx(-1)


def test_whole_examples_are_resampled() -> None:
    """With all values of an example alike, more of them narrow nothing."""
    a = np.random.default_rng(1).normal(size=(60, 1))
    one, many = (bootstrap(np.mean, np.repeat(a, n, axis=1)) for n in (1, 50))
    assert (one.low, one.high) == pytest.approx((many.low, many.high))


def one_position_each(n: int) -> tuple[Tensor, Tensor]:
    """Tokens, and a label that is read off them at some rate between chance and certainty."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, MASK, (n, 8), generator=generator)
    noise = torch.rand(tokens.shape, generator=generator) < 0.35
    return tokens, torch.where(noise, torch.randint(0, 2, tokens.shape, generator=generator), tokens % 2)


def test_intervals_of_probes_are_those_of_a_proportion() -> None:
    """One position per probe: hits are independent, so the interval is a binomial's, p ± 1.96 √(p (1 − p) / n)."""
    tokens, labels = one_position_each(1600)
    found = probe_latent(small_model(), tokens, labels, 2, n_loops=1, groups=torch.arange(8))
    p = found.accuracy.values
    assert (p > 0.6).all()
    assert (p < 0.95).all()
    expected = 2 * 1.959964 * np.sqrt(p * (1 - p) / found.n_test.values)
    ratio = (found.accuracy_high - found.accuracy_low).values / expected
    assert ratio.mean() == pytest.approx(1, abs=0.05)   # 0.84 for 90%


def test_selectivity_is_resampled_in_pairs() -> None:
    """A control that is the task under other names is right in the same examples: the difference is 0 in every draw."""
    tokens, labels = one_position_each(400)
    found = probe_latent(small_model(), tokens, labels, 2, n_loops=1, groups=torch.zeros(8, dtype=torch.long),
                         control_types=labels)
    assert ((found.accuracy_high - found.accuracy_low) > 0.02).all()
    for name in ("selectivity", "selectivity_low", "selectivity_high"):
        np.testing.assert_allclose(found[name], 0, atol=1e-12)
