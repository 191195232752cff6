"""Every number that a verdict of the stage test depends on, frozen with a date.

They were set before the bundled results were made. A change is a new date and every result made again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Constants of the rule in `probes.stage_test`."""

    date: str = "2026-11-26"
    same: float = 0.5               # τ above it: the other loop does most of the work
    different: float = 0.25         # τ below it: the other loop does hardly any of it
    same_fitted: float = 0.8        # the same for aligned τ: in the basis that suits it best, an operation that is
    different_fitted: float = 0.5   # merely alike does up to half of another's work, or more
    effect: float = 0.01            # smallest gain or work that counts, in nats per scored position …
    relative_effect: float = 0.01   # … or as a share of the NLL after one loop, whichever is larger
    level: float = 0.05             # error rate of a whole report, after Holm's correction
    clip: float = 1.0               # τ is cut to ±clip before it is averaged over pairs
    least_examples: int = 8         # with fewer nothing is decided
    least_seeds: int = 6            # training seeds that a statement about training needs (sign test: p = .031)
    resamples: int = 10_000         # draws of the bootstrap


THRESHOLDS = Thresholds()
