"""Intervals, tests and corrections, against formulas and against what scipy and simulation say."""

from __future__ import annotations

import numpy as np
import pytest

from probes.intervals import (
    Interval,
    NotDefinedError,
    Resampling,
    Spread,
    bootstrap,
    holm,
    interval,
    p_above,
    p_below,
    p_equivalent,
)


def test_bootstrap_covers_the_mean_like_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(np.mean, values, n_resamples=2000)
    spread = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(spread, rel=0.15)
    assert found == bootstrap(np.mean, values, n_resamples=2000)


def test_samples_are_resampled_together():
    values = np.random.default_rng(0).normal(size=200)
    found = bootstrap(lambda a, b: a.mean() - b.mean(), values, values + 3)
    assert found.low == pytest.approx(-3)
    assert found.high == pytest.approx(-3)
    draws = Resampling((200,), n_resamples=300)
    assert draws.mean(values + 3) - draws.mean(values) == pytest.approx(3)


@pytest.mark.unchecked
def test_samples_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="the same examples"):
        bootstrap(lambda a, b: a.mean() - b.mean(), np.zeros(4), np.zeros(5))
    with pytest.raises(ValueError, match="the same examples"):
        bootstrap(np.mean, np.zeros(4), sizes=(2, 3))
    with pytest.raises(ValueError, match="at least one example"):
        Resampling((3, 0))


def test_means_under_draws_are_those_of_the_drawn_examples():
    values = np.random.default_rng(1).normal(size=(7, 2))
    values[2, 1] = np.nan
    draws = Resampling((7,), n_resamples=50, seed=3)
    by_hand = [np.nanmean(values[picked], axis=0) for picked in draws.indices()]
    assert draws.mean(values) == pytest.approx(np.array(by_hand))


def test_seeds_are_resampled_outside_their_examples():
    """Six seeds that differ by much, with examples that hardly do: the interval is that of six numbers."""
    rng = np.random.default_rng(0)
    levels = rng.normal(size=6)
    values = np.concatenate([level + 0.01 * rng.normal(size=50) for level in levels])
    draws = Resampling((50,) * 6, n_resamples=4000)
    assert draws.mean(values).std() == pytest.approx(levels.std() / np.sqrt(6), rel=0.05)
    flat = Resampling((300,), n_resamples=4000)
    assert flat.mean(values).std() < 0.3 * draws.mean(values).std()
    assert all(len(picked) == 300 for picked in draws.indices())


def test_a_draw_takes_as_many_examples_of_a_seed_as_it_has():
    draws = Resampling((5, 20), n_resamples=200)
    first, second = draws.counts[:, :5].sum(1), draws.counts[:, 5:].sum(1)
    assert set(first) <= {0, 5, 10}
    assert set(second) <= {0, 20, 40}
    assert {0, 10} <= set(first)


def test_percentile_interval():
    found = interval(0.5, np.arange(1001) / 1000)
    assert (found.low, found.high) == pytest.approx((0.025, 0.975))


def test_intervals_compare_as_wholes():
    assert Interval(0.3, 0.2, 0.4).below(Interval(0.6, 0.5, 0.7))
    assert not Interval(0.3, 0.2, 0.55).below(Interval(0.6, 0.5, 0.7))
    assert not Interval(0.9, 0.8, 1.0).below(1)
    assert Interval(0.6, 0.5, 0.7).above(Interval(0.3, 0.2, 0.4))
    assert not Interval(0.6, 0.5, 0.7).above(0.5)


def test_p_values_count_the_draws_on_the_wrong_side():
    draws = np.array([0.1, 0.2, 0.3, np.nan])
    assert p_above(draws, 0.15) == pytest.approx(3 / 5)   # a draw without a value supports nothing
    assert p_below(draws, 0.25) == pytest.approx(3 / 5)
    assert p_above(draws[:3], 0.0) == pytest.approx(1 / 4)


def test_equivalence_needs_both_sides():
    rng = np.random.default_rng(0)
    assert p_equivalent(rng.normal(scale=0.1, size=5000), 1) < 0.001
    assert p_equivalent(rng.normal(loc=0.9, scale=0.1, size=5000), 1) > 0.1
    assert p_equivalent(rng.normal(loc=-0.9, scale=0.1, size=5000), 1) > 0.1
    assert p_equivalent(rng.normal(scale=2, size=5000), 1) > 0.3   # no knowledge is no equivalence


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm by hand
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert len(holm([])) == 0


def test_an_interval_of_nothing_is_refused_with_its_reason():
    with pytest.raises(NotDefinedError, match="not a finite number"):
        bootstrap(np.mean, np.array([1.0, np.nan, 2.0]))

    def of_the_first(values: np.ndarray) -> float:
        if 0 not in values:
            raise NotDefinedError("the first example is missing")
        return float(values.mean())

    assert bootstrap(of_the_first, np.arange(3)).high <= 2, "some resamples lack it, most do not"
    with pytest.raises(NotDefinedError, match="the first example is missing"):
        bootstrap(of_the_first, np.arange(1, 3))

    def of_all(values: np.ndarray) -> float:
        if len(set(values)) < 6:
            raise NotDefinedError("some example is missing")
        return 1.0

    with pytest.raises(NotDefinedError, match="in most resamples of the examples some example is missing"):
        bootstrap(of_all, np.arange(6))


def test_a_spread_is_mean_least_and_greatest():
    spread = Spread.of([0.5, 0.2, 0.8])
    assert (spread.value, spread.low, spread.high, spread.each) == (0.5, 0.2, 0.8, (0.5, 0.2, 0.8))
