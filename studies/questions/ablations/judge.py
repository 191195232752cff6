"""The ablation study in words: which changes move a measure by more than the base's seeds differ.

    sentences = judge(verdict["ablations"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CHANGES = {
    "base": "layers 1 and 2 of six looped, S ≤ 8", "one": "one looped layer", "four": "four looped layers",
    "first": "layers 0 and 1 looped", "middle": "layers 2 and 3 looped", "last": "layers 4 and 5 looped",
    "all": "all six layers looped", "injection": "input injected at each loop", "layernorm": "LayerNorm for RMSNorm",
    "no-qk-norm": "queries and keys not normalised", "loop-embedding": "a learned vector per loop",
    "smax4": "S ≤ 4 in training", "smax16": "S ≤ 16 in training"}
"""What each change is, in words."""

SMALLEST = 0.05
"""A change is told if it leaves the range of the base's seeds by at least this share."""
GROWS = 1.1
"""From this growth of its norm between loops 8 and 32 on, a state is said to grow."""


def judge(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changes move by at least `SMALLEST` beyond the range of the base's seeds, and whether states grow."""
    base = next(row for row in table if row["change"] == "base")["values"]
    sentences = []
    for key, noun in (("converged", "the share of states whose direction settles"),
                      ("exact", "the share of examples right at S_max")):
        seeds = defined_values(base[key])
        if not len(seeds):
            continue
        low, high = round(float(seeds.min()), 2), round(float(seeds.max()), 2)   # as printed
        outside = [(row["change"], round(float(defined_values(row["values"][key]).mean()), 2)) for row in table
                   if row["change"] != "base" and len(defined_values(row["values"][key]))]
        above = [f"{CHANGES.get(c, c)} ({v:.2f})" for c, v in outside if round(v - high, 2) >= SMALLEST]
        below = [f"{CHANGES.get(c, c)} ({v:.2f})" for c, v in outside if round(low - v, 2) >= SMALLEST]
        spread = f"{low:.2f}" if len(seeds) == 1 else f"{low:.2f} to {high:.2f} over {len(seeds)} seeds"
        sentences.append(f"In the base {noun} is {spread}. Higher than that by at least {SMALLEST:g}: "
                         f"{', '.join(above) or 'none'}; lower by as much: {', '.join(below) or 'none'}.")
    return sentences + _on_growth(table)


def _on_growth(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Do states come to rest at all? Their norms say."""
    growth = [float(seen.mean()) for row in table if len(seen := defined_values(row["values"]["norm_growth"]))]
    if not growth:
        return []
    growing = sum(factor >= GROWS for factor in growth)
    sentence = (f"From loop 8 to loop 32 the norm of the state grows by a factor of {min(growth):.1f} to "
                f"{max(growth):.1f}")
    if growing == len(growth):
        return [f"{sentence} in all {growing} variants: no state comes to rest, and only its direction can settle."]
    return [f"{sentence}, by {GROWS:g} or more in {growing} of {len(growth)} variants; there no state comes to rest, "
            "and only its direction can settle."]


def defined_values(values: Sequence[float | None]) -> np.ndarray:
    """The values that are defined; None stands for one that is not, as in JSON."""
    return np.array([value for value in values if value is not None])
