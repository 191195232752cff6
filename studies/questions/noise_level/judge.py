"""The noise level in decisions and sentences: pure functions of what was measured.

    verdict = judge({"automaton": (read, moved)}, {"automaton": (60,) * 6}, untrained={"automaton": read})
    verdict["rows"][0]["read"], verdict["rows"][0]["moved"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from probes.intervals import Claims, Interval, Resampling, interval
from probes.thresholds import THRESHOLDS, Thresholds

QUESTION = "Is the noise level decodable where the model is not told it, and does moving along it change the work?"
READABLE = 0.5
"""Share of the variance (R²) above which the noise level counts as decodable, and below which it does not."""
BEYOND = 0.1
"""Share of what confidence leaves open that the state must explain to tell more than confidence."""

MOVED = {
    "changes the work": "moving along it changes the work of the loop more than random pushes of the same length do",
    "no more than a random push": "moving along it changes the work no more than random pushes of the same length do",
    "undecided": "the intervals do not tell",
}
"""What moving the state can show."""


def judge(found: Mapping[str, tuple[xr.Dataset, xr.Dataset]], sizes: Mapping[str, Sequence[int]], *,
          untrained: Mapping[str, xr.Dataset], thresholds: Thresholds = THRESHOLDS, n_resamples: int = 20_000,
          seed: int = 0) -> dict[str, Any]:
    """Rows, one per subject, and sentences; all claims are corrected together (Holm)."""
    claims = Claims(thresholds.level)
    cells = {name: _Cell(name, *data, Resampling(sizes[name], n_resamples=n_resamples, seed=seed), claims, thresholds)
             for name, data in found.items()}
    claims.settle()
    rows = [cell.row(untrained.get(name)) for name, cell in cells.items()]
    return {"question": QUESTION, "rows": rows, "words": _sentences(rows)}


def r_squared(error: xr.DataArray, reader: str = "state", base: str = "mean") -> np.ndarray:
    """1 − squared error ÷ that of ``base``, per loop, from means over examples."""
    mean = error.mean("example")
    return (1 - mean.sel(reader=reader) / mean.sel(reader=base)).values


class _Cell:
    """The claims of one subject."""

    def __init__(self, name: str, read: xr.Dataset, moved: xr.Dataset, draws: Resampling, claims: Claims,
                 thresholds: Thresholds):
        self.name, self.read, self.claims, self.draws = name, read, claims, draws
        error = {reader: self._mean(read.error.sel(reader=reader)) for reader in read.reader.values}   # [draw, loop]
        last = read.sizes["loop"] - 1
        both = {"above": READABLE, "below": READABLE}
        self.first = self._claim("read 0", 1 - error["state"][:, 0] / error["mean"][:, 0], both)
        self.last = self._claim("read", 1 - error["state"][:, last] / error["mean"][:, last], both)
        self.beyond = self._claim("beyond", 1 - error["both"][:, last] / error["confidence"][:, last],
                                  {"above": BEYOND, "below": BEYOND})
        self.shuffled = float(1 - error["shuffled"][0, last] / error["mean"][0, last])
        nll = float(moved.nll.sel(push="along", sign=0).mean())
        self.delta = max(thresholds.effect, thresholds.relative_effect * nll)
        self.changes = {name: self._response(moved[name]) for name in ("entropy", "nll", "work")}
        random = [push for push in moved.push.values if push != "along"]
        odd = np.abs(moved.work.sel(sign=1) - moved.work.sel(sign=-1))
        extra = odd.sel(push="along") - odd.sel(push=random).mean("push")
        self.extra = self._claim("extra", self._mean(extra), {"above": self.delta, "within": self.delta,
                                                               "below": -self.delta})

    def _mean(self, values: xr.DataArray) -> np.ndarray:
        by_example = values.transpose("example", ...).values
        return np.concatenate([np.nanmean(by_example, 0)[None], self.draws.mean(by_example)])

    def _response(self, values: xr.DataArray) -> Interval:
        """What moving up changes, less what moving down does."""
        change = self._mean(values.sel(push="along", sign=1) - values.sel(push="along", sign=-1))
        return interval(float(change[0]), change[1:])

    def _claim(self, name: str, values: np.ndarray, sides: Mapping[str, float]) -> Interval:
        self.claims.add((self.name, name), values[1:], **sides)
        return interval(float(values[0]), values[1:])

    def _side(self, name: str) -> str:
        return self.claims.side((self.name, name))

    def row(self, untrained: xr.Dataset | None) -> dict[str, Any]:
        readable = {"above": "decodable", "below": "not decodable", "": "undecided"}
        return {"subject": self.name, "read": readable[self._side("read")],
                "read_first": readable[self._side("read 0")],
                "beyond_confidence": {"above": "yes", "below": "no", "": "undecided"}[self._side("beyond")],
                "moved": {"above": "changes the work", "within": "no more than a random push",
                          "below": "no more than a random push", "": "undecided"}[self._side("extra")],
                "r2": r_squared(self.read.error).tolist(), "r2_first": _numbers(self.first),
                "r2_last": _numbers(self.last),
                "r2_untrained": None if untrained is None else r_squared(untrained.error).tolist(),
                "r2_shuffled": self.shuffled, "partial": _numbers(self.beyond), "extra_work": _numbers(self.extra),
                "delta": self.delta, **{f"change_of_{name}": _numbers(value) for name, value in self.changes.items()},
                "n_examples": int(self.read.sizes["example"])}


def _sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What may be quoted; every number comes from the rows."""
    told = []
    for word in ("decodable", "not decodable", "undecided"):
        if of := [row for row in rows if row["read"] == word]:
            told.append(f"After the last loop the noise level is {word} from a masked position's state: "
                        + "; ".join(f"{row['subject']} R² {_told(row['r2_last'])}" for row in of) + ".")
    if both := [row for row in rows if row["r2_untrained"] is not None]:
        better = [row for row in both if row["r2_untrained"][-1] >= row["r2_last"]["value"]]
        told.append(f"In {len(better)} of {len(both)} tasks an untrained model of the same shape is read at least as "
                    "well (R² " + "; ".join(f"{row['subject']} {row['r2_untrained'][-1]:.2f}" for row in both)
                    + "): attention averages over masks whether or not anything was learned, so that a noise level "
                    "that can be decoded is no evidence that it is used.")
    beyond = [row for row in rows if row["beyond_confidence"] == "yes"]
    told.append(f"The state tells more than the answer's confidence does in {len(beyond)} of {len(rows)} tasks.")
    for word, what in MOVED.items():
        if of := [row for row in rows if row["moved"] == word]:
            told.append(f"{what[0].upper()}{what[1:]}: "
                        + "; ".join(f"{row['subject']} {_told(row['extra_work'], '.3f')} nat more" for row in of) + ".")
    return told


def _told(numbers: Mapping[str, float], form: str = ".2f") -> str:
    return f"{numbers['value']:{form}} [{numbers['low']:{form}}, {numbers['high']:{form}}]"


def _numbers(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}
