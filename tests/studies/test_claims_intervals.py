"""Intervals of the claims: inside what a quantity can be, bounds where a value is only bounded, none by rounding."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from studies.questions.claims.judge import (
    EQUAL_QUALITY,
    SMALLEST_NAT,
    Estimate,
    Judgement,
    judge,
    quantity,
    ratio_quantity,
)
from studies.questions.claims.measure import _flops_ratio

N_LOOPS = [1, 2, 4, 8, 16, 32]
T = [round(0.1 * i, 1) for i in range(1, 11)]


def over_seeds(*values: float) -> xr.DataArray:
    return xr.DataArray(list(values), dims="seed")


def made_up(seed: int, *, n_seeds: int, spread: float = 1.0, noise: float = 0.0, n: int = 24) -> dict[str, xr.Dataset]:
    """Measurements as `measure` leaves them: accuracies of 0 or 1 around a level, ``noise`` on everything."""
    rng = np.random.default_rng(seed)
    kinds, thresholds = ["loop", "twin", "deep"], [0.0, 0.1, 0.2]

    def values(*shape: int, exact: bool = False) -> np.ndarray:
        level = np.clip(0.5 + spread * (rng.random((n_seeds, *shape[:-1], 1)) - 0.5), 0, 1)
        found = (rng.random((n_seeds, *shape)) < level).astype(float) if exact and spread else np.broadcast_to(
            level, (n_seeds, *shape)).copy()
        return found + noise * rng.standard_normal(found.shape)

    dims, seeds = ("seed", "kind", "n_loops", "example"), {"seed": np.arange(n_seeds)}
    loops = xr.Dataset({name: (dims, values(3, len(N_LOOPS), n, exact=name == "exact"))
                        for name in ("nelbo", "exact", "cells")},
                       coords={**seeds, "kind": kinds, "n_loops": N_LOOPS})
    adaptive = xr.Dataset({name: (("seed", "threshold", "example"), values(3, n, exact=name == "exact"))
                           for name in ("exact", "cells")}, coords={**seeds, "threshold": thresholds})
    used = 8 - np.floor(spread * 7.99 * rng.random((n_seeds, 3, n)))
    used[:, 0] = 8
    adaptive["loops_used"] = (("seed", "threshold", "example"), used)
    sampling = xr.Dataset({
        "equal_exact": (("seed", "plan", "example"), values(2, n, exact=True)),
        "steps_exact": (("seed", "loops", "n_steps", "example"), values(2, 2, n, exact=True))},
        coords={**seeds, "loops": [1, 8], "n_steps": [1, 8], "n_loops": ("plan", [1, 8]),
                "n_steps_of_plan": ("plan", [18, 4])})
    return {
        "training": xr.Dataset({"flops_ratio": (("seed", "kind"), 1 + noise + spread * rng.random((n_seeds, 3))),
                                "flops_ratio_side": (("seed", "kind"), np.zeros((n_seeds, 3)))},
                               coords={**seeds, "kind": kinds}),
        "loops": loops, "adaptive": adaptive, "sampling": sampling,
        "noise": xr.Dataset({"gain": (("seed", "t", "example"), values(10, n))}, coords={**seeds, "t": T}),
        "attention": xr.Dataset({"flow": (("seed", "loop", "example"), values(16, n))},
                                coords={**seeds, "loop": np.arange(1, 17)})}


def all_quantities(pooled: dict[str, xr.Dataset]) -> list[Estimate]:
    return [q for judgement in judge(pooled).values() for q in judgement.quantities]


def limits_of(found: Estimate) -> tuple[float, float]:
    """What a quantity can be, from what its label says it is."""
    if "÷" in found.label:
        return 0, math.inf
    if found.per_cent:
        return (-2, 2) if found.label.startswith("gain of") else (-1, 1)
    if found.label == "share of loops saved":
        return 0, 1 - 1 / 8
    if found.label == "loops used":
        return 1, 8
    if found.label.startswith("share of attention"):
        return -1, 1
    if found.label.startswith("half that change"):
        return -1, 0.5
    assert "[nat]" in found.label, f"what can {found.label} be?"
    return -math.inf, math.inf


# ------------------------------------------------------------------------------------------ ranges


@pytest.mark.parametrize("n_seeds", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_no_interval_leaves_what_its_quantity_can_be(seed: int, n_seeds: int) -> None:
    for found in all_quantities(made_up(seed, n_seeds=n_seeds)):
        low, high = limits_of(found)
        if not math.isnan(found.low):
            assert low <= found.low <= found.value <= found.high <= high, found.text


def test_an_interval_inside_its_range_is_left_as_it_is() -> None:
    wide, limited = (quantity("x", over_seeds(0.1, 0.12, 0.11), limits=limits)
                     for limits in ((-math.inf, math.inf), (-1, 1)))
    assert wide == limited
    assert quantity("x", over_seeds(0.0, 0.9, 1.0), limits=(-1, 1)).high == 1


@pytest.mark.parametrize("n", [4, 96])
def test_examples_all_alike_leave_the_doubt_that_their_number_leaves(n: int) -> None:
    """The exact 95% interval of a share, of which all n examples had it."""
    found = quantity("x", xr.DataArray(np.ones((1, n)), dims=("seed", "example")), limits=(0, 1))
    expected = stats.binomtest(n, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    unlimited = quantity("x", xr.DataArray(np.ones((1, n)), dims=("seed", "example")))
    assert math.isnan(unlimited.low)
    assert unlimited.word == "undecided"


def test_saturation_has_an_interval_with_one_seed_too() -> None:
    pooled = made_up(0, n_seeds=1)
    jitter = 0.01 * np.random.default_rng(1).standard_normal((1, 1, 24))
    loop = xr.DataArray(np.arange(1, 17), dims="loop").clip(max=8).values[None, :, None]
    pooled["attention"]["flow"] = (("seed", "loop", "example"), 0.05 * loop + jitter * loop)
    saturated = judge(pooled)["e"]
    assert saturated.word == "holds here"
    assert saturated.quantities[1].low > 0
    pooled["attention"]["flow"] = (("seed", "loop", "example"),
                                   0.02 * np.arange(1, 17)[None, :, None] + jitter * np.ones((1, 16, 1)))
    assert judge(pooled)["e"].word == "does not hold here", "it grows, and goes on growing"


# ------------------------------------------------------------------------------------------ ratios


def test_ratios_are_averaged_on_a_logarithmic_scale() -> None:
    ratios = np.array([0.5, 2.0, 3.0, 1.2])
    found = ratio_quantity("x", over_seeds(*ratios), over_seeds(0, 0, 0, 0), bound=1)
    expected = stats.ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    assert found.value == pytest.approx(stats.gmean(ratios))
    assert (found.low, found.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    inverse = ratio_quantity("x", over_seeds(*1 / ratios), over_seeds(0, 0, 0, 0), bound=1)
    assert (1 / inverse.high, 1 / inverse.low) == pytest.approx((found.low, found.high)), "a ratio has no direction"


@pytest.mark.parametrize(("values", "sides", "estimate"), [
    ([0.9], [-1], "< 0.9"), ([30.0], [1], "> 30"), ([2.0], [0], "2"),
    ([0.9, 2.0, 3.0], [-1, 0, 0], "2"),              # the median is one that is known
    ([0.9, 0.8, 3.0], [-1, -1, 0], "< 0.9"),
    ([40.0, 50.0, 3.0], [1, 1, 0], "> 40"),
    ([0.9, 2.0], [-1, 0], "< 1.34"),
    ([0.9, 50.0], [-1, 1], "unknown")])
def test_what_was_never_reached_is_a_bound_and_no_zero(values: list[float], sides: list[int], estimate: str) -> None:
    found = ratio_quantity("x", over_seeds(*values), over_seeds(*sides), bound=1, smallest=0.05)
    assert found.estimate == estimate
    assert found.word == "undecided", "so few seeds with bounds among them decide nothing"
    saved = json.loads(json.dumps(Judgement("a", "c", (found,)).to_dict(), allow_nan=False))
    assert Judgement.from_dict(saved).to_dict() == Judgement("a", "c", (found,)).to_dict()


@pytest.mark.parametrize(("value", "side", "word"), [(0.8, -1, "does not hold here"), (30.0, 1, "holds here")])
def test_six_bounds_on_one_side_decide(value: float, side: int, word: str) -> None:
    """P(six of six on one side of the median) = 2 · (1/2)^6 = 3.1%; of five, 6.3%."""
    values, sides = over_seeds(*[value] * 6), over_seeds(*[side] * 6)
    found = ratio_quantity("x", values, sides, bound=1, smallest=0.05)
    assert found.word == word
    saved = json.loads(json.dumps(Judgement("a", "c", (found,)).to_dict(), allow_nan=False))
    assert Judgement.from_dict(saved).quantities[0] == found
    assert ratio_quantity("x", values[:5], sides[:5], bound=1, smallest=0.05).word == "undecided"


def test_seeds_of_which_a_ratio_was_not_measured_do_not_count() -> None:
    known = ratio_quantity("x", over_seeds(2, 3), over_seeds(0, 0))
    assert ratio_quantity("x", over_seeds(2, np.nan, 3), over_seeds(0, np.nan, 0)) == known
    with pytest.raises(ValueError, match="nothing but NaN"):
        ratio_quantity("x", over_seeds(np.nan), over_seeds(np.nan))


def curve(*nelbo: float, last_flops: float = 4.0) -> pd.DataFrame:
    return pd.DataFrame({"flops": np.linspace(last_flops / len(nelbo), last_flops, len(nelbo)), "nelbo": nelbo})


@pytest.mark.parametrize(("loop", "twin", "expected"), [
    (curve(4, 3, 2, 1), curve(4, 2), (4 / 3, 0)),                        # reached at FLOPs 3
    (curve(4, 3, 2, 1), curve(4, 0.5), (1.0, -1)),                       # never: at most 4 ÷ 4
    (curve(4, 3, 2, 1), curve(4, 0.5, last_flops=3), (0.75, -1)),
    (curve(4, 3, 2, 1), curve(9, 5), (4.0, 1)),                          # at the first evaluation, at FLOPs 1
    (curve(4, 3, 2, 1), curve(9, 4), (4.0, 1))])
def test_flops_to_reach_another_models_bound(loop: pd.DataFrame, twin: pd.DataFrame,
                                             expected: tuple[float, int]) -> None:
    assert _flops_ratio(loop, twin) == pytest.approx(expected)


def test_the_page_says_in_words_that_a_ratio_is_a_bound() -> None:
    pooled = made_up(0, n_seeds=3)
    pooled["training"]["flops_ratio_side"].loc[{"kind": "twin", "seed": 1}] = -1
    pooled["training"]["flops_ratio_side"].loc[{"kind": "deep", "seed": 2}] = 1
    judged = judge(pooled)["a"]
    assert "never reaches the twin's last NELBO in 1 of 3 seeds" in judged.note
    assert "has the deep twin's last NELBO at its first evaluation in 1 of 3 seeds" in judged.note
    assert judged.quantities[0].over == "median of 3 seeds, 1 of them a bound"


# ---------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 4e-16, 1e-9])
@pytest.mark.parametrize("seed", range(4))
def test_differences_of_rounding_decide_nothing(seed: int, noise: float, n_seeds: int) -> None:
    """Measurements that are all the same but for rounding: no claim that something is larger can hold."""
    judged = judge(made_up(seed, n_seeds=n_seeds, spread=0.0, noise=noise))
    assert {letter for letter, judgement in judged.items() if judgement.word == "holds here"} == set()
    assert not any(q.word == "holds here" for judgement in judged.values() for q in judgement.quantities)


@pytest.mark.parametrize("low", [4e-16, 0.9 * SMALLEST_NAT])
def test_an_effect_below_the_smallest_that_counts_does_not_hold(low: float) -> None:
    assert Estimate("x", low, low, low, "3 seeds", smallest=SMALLEST_NAT).word == "does not hold here"
    assert Estimate("x", 1, low, 1, "3 seeds", smallest=SMALLEST_NAT).word == "undecided"


@pytest.mark.parametrize("off", [-1e-16, 0, 1e-16])
def test_an_interval_that_ends_at_the_bound_is_undecided_whatever_rounding_did(off: float) -> None:
    assert Estimate("x", 0.3, 0.25 + off, 0.4, "3 seeds", bound=0.25).word == "undecided"
    assert Estimate("x", 0.2, 0.1, 0.25 + off, "3 seeds", bound=0.25).word == "undecided"


def test_a_loss_at_the_limit_of_equal_quality_is_no_loss_whatever_rounding_did() -> None:
    """.79 − .78 is a little more than .01 in double precision."""
    assert 2 * EQUAL_QUALITY < 0.79 - 0.78
    pooled = made_up(0, n_seeds=1, n=100)
    right = np.zeros((1, 3, 100))
    right[0, 0, :79], right[0, 1, :78] = 1, 1
    pooled["adaptive"]["exact"] = (("seed", "threshold", "example"), right)
    pooled["adaptive"]["cells"] = (("seed", "threshold", "example"), np.full((1, 3, 100), 0.5))
    assert "τ = 0.1 " in judge(pooled)["f"].note


def test_noise_levels_of_equal_gain_are_all_named() -> None:
    pooled = made_up(0, n_seeds=2, spread=0.0)
    level = np.select([np.isin(T, [0.3, 0.8, 0.9])], [1.0], 0.5) + 1e-12 * np.arange(10)
    pooled["noise"]["gain"] = pooled["noise"].gain * 0 + xr.DataArray(level, dims="t")
    assert judge(pooled)["d"].note == "The gain is largest at t = 0.3, 0.8 and 0.9."


def test_seeds_that_differ_by_rounding_alone_are_no_evidence_about_other_seeds() -> None:
    values: Any = np.random.default_rng(0).random((1, 40)) + 4e-16 * np.arange(3)[:, None]
    found = quantity("x", xr.DataArray(values, dims=("seed", "example")))
    assert found.over == "3 seeds without spread, over 40 examples"
    assert found.high - found.low > 0.05
    assert math.isnan(quantity("x", over_seeds(1, 1 + 4e-16, 1)).low)
