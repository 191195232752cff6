"""Whether a change of the training recipe is better or worse: differences paired by seed, with intervals.

    differences(runs)[0].word                             # "worse", "better", "undecided" …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Run = Mapping[str, Any]
FEWEST = 3
"""Seeds from which on a difference has an interval and can be judged."""


@dataclass(frozen=True)
class Difference:
    """Held-out NELBO of a change minus that of the recipe, on one task at one budget [nat per free token]."""

    task: str
    change: str
    budget_flops: float
    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, Student's t over seeds; None of fewer than `FEWEST`."""
        n = len(self.by_seed)
        if n < FEWEST:
            return None
        half = float(stats.t.ppf(0.975, n - 1) * np.std(self.by_seed, ddof=1) / np.sqrt(n))
        return self.mean - half, self.mean + half

    @property
    def word(self) -> str:
        """worse, better, undecided (the interval holds 0), or how many runs there are if they are too few."""
        if self.interval is None:
            return "single run" if len(self.by_seed) == 1 else f"{len(self.by_seed)} runs"
        low, high = self.interval
        return "worse" if low > 0 else "better" if high < 0 else "undecided"

    @property
    def text(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.3f} ({self.word})"
        return f"{self.mean:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}] ({self.word})"


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Every change on every task and budget at which the recipe itself was run with the same seeds."""
    base = {(run["task"], run["budget_flops"], run["seed"]): run["nelbo"] for run in runs if run["change"] == "recipe"}
    found: dict[tuple[str, str, float], dict[int, float]] = {}
    for run in runs:
        key = run["task"], run["budget_flops"], run["seed"]
        if run["change"] != "recipe" and key in base:
            place = found.setdefault((run["task"], run["change"], run["budget_flops"]), {})
            place[run["seed"]] = run["nelbo"] - base[key]
    return [Difference(*key, tuple(values[seed] for seed in sorted(values))) for key, values in found.items()]
