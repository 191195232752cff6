"""Intervals, tests and corrections: the one place where chance is reckoned with.

Resampling is hierarchical: training seeds outside, the examples of each seed inside. One set of draws serves every
number of a report, so that numbers which belong together are resampled together (paired).

    draws = Resampling((48,), n_resamples=2000, seed=0)
    ratio = 1 - draws.mean(exchanged) / draws.mean(left_out)     # [resample]
    interval(1 - exchanged.mean() / left_out.mean(), ratio)      # Interval
    holm([0.001, 0.02, 0.04])                                    # adjusted p-values, in the same order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Shaped

LEVEL = 0.95
"""Coverage of every interval."""

Side = Literal["above", "below", "within", ""]
"""Where a quantity lies relative to what it was compared with; "" is not decided."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def below(self, other: Interval | float) -> bool:
        """Does the whole interval lie below a number, or below another whole interval?"""
        return self.high < (other.low if isinstance(other, Interval) else other)

    def above(self, other: Interval | float) -> bool:
        """Does the whole interval lie above a number, or above another whole interval?"""
        return self.low > (other.high if isinstance(other, Interval) else other)


@dataclass(frozen=True)
class Spread(Interval):
    """One number of each of several models: ``value`` is their mean, ``low`` and ``high`` the least and greatest."""

    each: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, each: Sequence[float]) -> Spread:
        return cls(float(np.mean(each)), min(each), max(each), tuple(each))


class NotDefinedError(ValueError):
    """A statistic has no value here. The message is the reason, worded to follow "not defined because …"."""


@dataclass(frozen=True)
class NotDefined:
    """In place of an interval: there is no value, and why."""

    reason: str

    def __str__(self) -> str:
        return f"not defined because {self.reason}"


def interval(value: float, draws: Float[np.ndarray, "resample"]) -> Interval:
    """Percentile interval of an estimate from its values under resampling (Efron 1979)."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


class Resampling:
    """Draws of examples with replacement, held as counts; hierarchical where there are several seeds.

    ``sizes`` holds the number of examples of each training seed, whose values stand one after another on the first
    axis of every sample. A draw picks seeds with replacement, then for each picked seed its own examples with
    replacement (Davison & Hinkley 1997, section 3.8). With one seed it is the ordinary bootstrap over examples.
    """

    def __init__(self, sizes: Sequence[int], *, n_resamples: int = 2000, seed: int = 0):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every seed needs at least one example; their numbers are {tuple(sizes)}.")
        rng = np.random.default_rng(seed)
        self.sizes = tuple(sizes)
        self.counts: Float[np.ndarray, "resample example"] = np.zeros((n_resamples, sum(sizes)))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for row in self.counts:
            for picked in rng.integers(0, len(sizes), len(sizes)) if len(sizes) > 1 else (0,):
                row[starts[picked]:starts[picked + 1]] += np.bincount(
                    rng.integers(0, sizes[picked], sizes[picked]), minlength=sizes[picked])

    def mean(self, values: Float[np.ndarray, "example *rest"]) -> Float[np.ndarray, "resample *rest"]:
        """The mean over examples under every draw; an example whose value is NaN is left out of it."""
        flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
        known = ~np.isnan(flat)
        total = self.counts @ np.where(known, flat, 0.0)
        number = self.counts @ known.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return (total / np.where(number > 0, number, np.nan)).reshape(len(self.counts), *values.shape[1:])

    def indices(self) -> list[Int[np.ndarray, "example"]]:
        """The examples of each draw, for statistics that are no means."""
        return [np.repeat(np.arange(len(row)), row.astype(int)) for row in self.counts]


def bootstrap(statistic: Callable[..., float], *samples: Shaped[np.ndarray, "example ..."] | xr.DataArray,
              seed: int = 0, n_resamples: int = 500, sizes: Sequence[int] = ()) -> Interval:
    """Percentile interval of ``statistic(*samples)``; all samples are resampled by the same draws.

    The first axis of every sample is the example; ``sizes`` says how many belong to each training seed.
    Raises NotDefinedError if the statistic raises it, or is not a finite number, for the examples as they are or for
    more than half of the draws; fewer such draws are left out.
    """
    n = len(samples[0])
    if any(len(sample) != n for sample in samples) or (sizes and sum(sizes) != n):
        raise ValueError(f"samples have {[len(sample) for sample in samples]} examples and seeds {tuple(sizes)}: "
                         "they must be the same examples, in the same order.")
    value, draws, reason = _finite(statistic, samples), [], ""
    for picked in Resampling(sizes or (n,), n_resamples=n_resamples, seed=seed).indices():
        try:
            draws.append(_finite(statistic, tuple(sample[picked] for sample in samples)))
        except NotDefinedError as error:
            reason = str(error)
    if len(draws) < n_resamples / 2:
        raise NotDefinedError(f"in most resamples of the examples {reason}")
    return interval(value, np.array(draws))


def _finite(statistic: Callable[..., float], samples: tuple[Any, ...]) -> float:
    value = float(statistic(*samples))
    if not np.isfinite(value):
        raise NotDefinedError("it is not a finite number for some example")
    return value


def over_examples(values: xr.DataArray, *, n_resamples: int = 2000, seed: int = 0) -> xr.Dataset:
    """Mean over ``example`` with its 95% bootstrap interval: ``value``, ``low``, ``high``; NaN examples are left out.

    Raises ValueError without an example dimension.
    """
    if "example" not in values.dims:
        raise ValueError(f"values have the dimensions {', '.join(map(str, values.dims))}, and no examples.")
    first = values.transpose("example", ...)
    draws = Resampling((first.sizes["example"],), n_resamples=n_resamples, seed=seed).mean(first.values)
    mean = first.mean("example", keep_attrs=True)
    tail = (1 - LEVEL) / 2
    low, high = (mean.copy(data=np.where(mean.isnull(), np.nan, bound)) for bound in
                 np.nanquantile(np.where(mean.isnull(), 0.0, draws), [tail, 1 - tail], axis=0))
    return xr.Dataset({"value": mean, "low": low, "high": high})


def jackknife(statistic: Callable[[Int[np.ndarray, "example"]], Float[np.ndarray, "*place"]], n: int, *,
              groups: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of all ``n`` examples with its 95% interval, for statistics that a repeated example would spoil.

    ``statistic`` takes the indices of some examples. Delete-a-group jackknife (Shao & Wu 1989): its variance is
    (g − 1)/g Σ (θ_(i) − mean)² over g groups of examples left out in turn; the interval is ± 1.96 times its root.
    Raises ValueError for fewer than 4 examples.
    """
    if n < 4:
        raise ValueError(f"an interval by leaving examples out takes at least 4, not {n}.")
    order, g = np.random.default_rng(seed).permutation(n), min(groups, n)
    value = np.asarray(statistic(np.arange(n)))
    left = np.stack([statistic(np.sort(np.delete(order, np.arange(i, n, g)))) for i in range(g)])
    half = 1.959964 * np.sqrt((g - 1) / g * np.square(left - left.mean(0)).sum(0))
    return value, np.asarray(value - half), np.asarray(value + half)


# ------------------------------------------------------------------------ tests

def p_above(draws: Float[np.ndarray, "resample"], threshold: float) -> float:
    """One-sided p-value of "the quantity lies above the threshold": the share of draws that do not, never 0."""
    return float((1 + np.sum(~(draws > threshold))) / (1 + len(draws)))


def p_below(draws: Float[np.ndarray, "resample"], threshold: float) -> float:
    """One-sided p-value of "the quantity lies below the threshold"."""
    return float((1 + np.sum(~(draws < threshold))) / (1 + len(draws)))


def p_equivalent(draws: Float[np.ndarray, "resample"], margin: float) -> float:
    """p-value of "the quantity lies within ±margin": the larger of two one-sided tests (TOST, Schuirmann 1987)."""
    return max(p_above(draws, -margin), p_below(draws, margin))


def holm(p_values: Sequence[float]) -> Float[np.ndarray, "test"]:
    """p-values adjusted for all tests of a report (Holm 1979): compare them with the level of the whole report."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted


class Claims:
    """All claims of a report. Register first, `settle` once, then ask."""

    def __init__(self, level: float):
        self.level = level
        self._p: dict[tuple, float] = {}
        self._side: dict[tuple, Side] = {}
        self._adjusted: dict[tuple, float] = {}

    def add(self, key: tuple, draws: Float[np.ndarray, "resample"], *, above: float | None = None,
            below: float | None = None, within: float | None = None) -> None:
        """Test whichever of the sides that are given the draws speak for most; p counts how many were tried."""
        tried: dict[Side, float] = {}
        if above is not None:
            tried["above"] = p_above(draws, above)
        if below is not None:
            tried["below"] = p_below(draws, below)
        if within is not None:
            tried["within"] = p_equivalent(draws, within)
        side = min(tried, key=lambda name: tried[name])
        self._p[key] = min(1.0, tried[side] * len(tried))
        self._side[key] = side

    def settle(self) -> None:
        keys = list(self._p)
        self._adjusted = dict(zip(keys, holm([self._p[key] for key in keys]).tolist(), strict=True))

    def __contains__(self, key: tuple) -> bool:
        return key in self._p

    def p(self, key: tuple) -> float:
        return self._adjusted[key]

    def side(self, key: tuple) -> Side:
        return self._side[key] if self._adjusted[key] <= self.level else ""
