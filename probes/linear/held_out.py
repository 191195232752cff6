"""Held-out examples: who is fitted, who is judged, and intervals of what the judged ones say."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.intervals import LEVEL, Resampling

N_RESAMPLES = 1000


class Ratio(NamedTuple):
    """A value per site with its 95% percentile interval over resampled examples."""

    value: Float[np.ndarray, "*site"]
    low: Float[np.ndarray, "*site"]
    high: Float[np.ndarray, "*site"]


def held_out(n: int, fraction: float, seed: int) -> Bool[Tensor, "batch"]:
    """The examples that are judged, drawn at random. Raises ValueError where a side would be empty."""
    n_test = round(n * fraction)
    if not 1 <= n_test < n:
        raise ValueError(f"test_fraction {fraction} of {n} examples leaves {n_test} to test on and {n - n_test} to "
                         "train on: give more examples.")
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_test]] = True
    return chosen


def ratio(total: Float[np.ndarray, "example *site"], count: Float[np.ndarray, "example *#site"], *,
          seed: int = 0) -> Ratio:
    """Σ total ÷ Σ count over examples: a mean over points, of which an example may have several or none.

    An interval has no width where every example says the same.
    """
    resampling = Resampling((len(total),), n_resamples=N_RESAMPLES, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = resampling.mean(total) / resampling.mean(np.broadcast_to(count, total.shape))
        value = total.sum(0) / np.broadcast_to(count, total.shape).sum(0)
    tail = (1 - LEVEL) / 2
    known = np.isfinite(value)
    low, high = np.nanquantile(np.where(known, draws, 0.0), [tail, 1 - tail], axis=0)
    return Ratio(value, np.where(known, low, np.nan), np.where(known, high, np.nan))
