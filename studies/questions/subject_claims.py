"""The claims of one subject of a study: means of its per-example values under resampling, and what holds of them.

    claims = Claims(0.05)
    one = SubjectClaims("automaton", (32,) * 6, claims)
    tau = one.claim("tau", one.mean(values), {"above": 0.5, "below": 0.25})          # values [example, …]
    claims.settle()
    one.side("tau")                                           # "above", "below" or "" where nothing holds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from probes.intervals import Claims, Interval, Resampling, Side, interval


class SubjectClaims:
    """Claims of one subject among those of a page, which are corrected together."""

    def __init__(self, name: str, sizes: Sequence[int], claims: Claims, *, n_resamples: int = 20_000, seed: int = 0):
        self.name, self._claims = name, claims
        self._draws = Resampling(sizes, n_resamples=n_resamples, seed=seed)

    def mean(self, values: xr.DataArray) -> np.ndarray:
        """Mean over examples, as they are and then under every draw: [draw, …]."""
        by_example = values.transpose("example", ...).values
        return np.concatenate([np.nanmean(by_example, 0)[None], self._draws.mean(by_example)])

    def claim(self, name: str, values: np.ndarray, sides: Mapping[str, float]) -> Interval:
        """Register a claim on a quantity, given its estimate and then its draws; its interval."""
        self._claims.add((self.name, name), values[1:], **sides)
        return estimate(values)

    def side(self, name: str) -> Side:
        """What holds of a quantity, once the claims of the page are settled."""
        return self._claims.side((self.name, name))


def estimate(values: np.ndarray) -> Interval:
    """The interval of a quantity, given its estimate and then its draws."""
    return interval(float(values[0]), values[1:])


def as_numbers(found: Interval) -> dict[str, float]:
    """An interval for JSON."""
    return {"value": found.value, "low": found.low, "high": found.high}


def in_words(numbers: Mapping[str, float], form: str) -> str:
    """0.94 [0.90, 0.97], each number in this format."""
    return f"{numbers['value']:{form}} [{numbers['low']:{form}}, {numbers['high']:{form}}]"
