"""Comparing costs on a machine that others use too: alternating runs, medians of ratios.

Every round runs each contender once, in an order drawn anew, so that a slow moment falls on all of
them. A comparison is the ratio within a round; its median over rounds is reported with a
95% bootstrap interval over rounds. What is timed is the processor time of this process, on one thread,
which equals wall-clock time on a free machine and is not lengthened by other processes' turns.

    times = alternate({"plain": f, "hooked": g}, rounds=100, seed=0)
    compare(times, "hooked", "plain")               # Estimate(median=1.01, low=1.00, high=1.02)
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Times = dict[str, np.ndarray]
"""Seconds per round, by contender; the rounds are shared."""


class Estimate(NamedTuple):
    """A median over rounds with its 95% bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def alternate(contenders: Mapping[str, Callable[[], object]], *, rounds: int, seed: int = 0,
              warm_up: int = 3) -> Times:
    """Time each contender once per round, in random order, right after an untimed run, the garbage collector off."""
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    rng = np.random.default_rng(seed)
    names = list(contenders)
    times: Times = {name: np.zeros(rounds) for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in rng.permutation(names):
                contenders[name]()  # so that the caches hold its own code and data, not its predecessor's
                start = time.process_time()
                contenders[name]()
                times[name][i] = time.process_time() - start
            gc.collect(0)
    finally:
        gc.enable()
    return times


def compare(times: Times, contender: str, yardstick: str, *, seed: int = 0) -> Estimate:
    """Median over rounds of time(contender) / time(yardstick)."""
    return _estimate(times[contender] / times[yardstick], seed)


def compare_extra(times: Times, contender: tuple[str, str], yardstick: tuple[str, str], *, seed: int = 0) -> Estimate:
    """Ratio of extra costs: median(contender − its base) / median(yardstick − its base), each difference in a round."""
    ours = times[contender[0]] - times[contender[1]]
    theirs = times[yardstick[0]] - times[yardstick[1]]
    rows = np.random.default_rng(seed).integers(len(ours), size=(2000, len(ours)))
    draws = np.median(ours[rows], axis=1) / np.median(theirs[rows], axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(np.median(ours) / np.median(theirs)), float(low), float(high))


def milliseconds(times: Times, contender: str, *, seed: int = 0) -> Estimate:
    """Median time of one run."""
    return _estimate(times[contender] * 1e3, seed)


def _estimate(values: np.ndarray, seed: int) -> Estimate:
    rows = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(np.median(values[rows], axis=1), (0.025, 0.975))
    return Estimate(float(np.median(values)), float(low), float(high))
