"""The noise level in decisions and sentences: pure functions of what was measured.

    verdict = judge({"automaton": (read, moved)}, {"automaton": (60,) * 6}, untrained={"automaton": read})
    verdict["rows"][0]["read"], verdict["rows"][0]["moved"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from probes.intervals import Claims
from probes.thresholds import THRESHOLDS, Thresholds
from studies.questions.subject_claims import SubjectClaims, as_numbers, estimate, in_words

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
    cells = [_Cell(SubjectClaims(name, sizes[name], claims, n_resamples=n_resamples, seed=seed), *data, thresholds)
             for name, data in found.items()]
    claims.settle()
    rows = [cell.row(untrained.get(cell.claims.name)) for cell in cells]
    return {"question": QUESTION, "rows": rows, "words": _sentences(rows)}


def r_squared(error: xr.DataArray, reader: str = "state", base: str = "mean") -> np.ndarray:
    """1 − squared error ÷ that of ``base``, per loop, from means over examples."""
    mean = error.mean("example")
    return (1 - mean.sel(reader=reader) / mean.sel(reader=base)).values


class _Cell:
    """What is claimed of one subject, and what follows."""

    def __init__(self, claims: SubjectClaims, read: xr.Dataset, moved: xr.Dataset, thresholds: Thresholds):
        self.claims, self.read = claims, read
        error = {reader: claims.mean(read.error.sel(reader=reader)) for reader in read.reader.values}  # [draw, loop]
        last = read.sizes["loop"] - 1
        both = {"above": READABLE, "below": READABLE}
        self.first = claims.claim("read 0", 1 - error["state"][:, 0] / error["mean"][:, 0], both)
        self.last = claims.claim("read", 1 - error["state"][:, last] / error["mean"][:, last], both)
        self.beyond = claims.claim("beyond", 1 - error["both"][:, last] / error["confidence"][:, last],
                                   {"above": BEYOND, "below": BEYOND})
        self.shuffled = float(1 - error["shuffled"][0, last] / error["mean"][0, last])
        nll = float(moved.nll.sel(push="along", sign=0).mean())
        self.delta = max(thresholds.effect, thresholds.relative_effect * nll)
        responses = {name: moved[name].sel(sign=1) - moved[name].sel(sign=-1) for name in ("entropy", "nll", "work")}
        self.changes = {name: estimate(claims.mean(response.sel(push="along"))) for name, response in responses.items()}
        odd = abs(responses["work"])
        random = [push for push in moved.push.values if push != "along"]
        extra = odd.sel(push="along") - odd.sel(push=random).mean("push")
        self.extra = claims.claim("extra", claims.mean(extra), {"above": self.delta, "within": self.delta,
                                                                 "below": -self.delta})

    def row(self, untrained: xr.Dataset | None) -> dict[str, Any]:
        readable = {"above": "decodable", "below": "not decodable", "": "undecided"}
        return {"subject": self.claims.name, "read": readable[self.claims.side("read")],
                "read_first": readable[self.claims.side("read 0")],
                "beyond_confidence": {"above": "yes", "below": "no", "": "undecided"}[self.claims.side("beyond")],
                "moved": {"above": "changes the work", "within": "no more than a random push",
                          "below": "no more than a random push", "": "undecided"}[self.claims.side("extra")],
                "r2": r_squared(self.read.error).tolist(), "r2_first": as_numbers(self.first),
                "r2_last": as_numbers(self.last),
                "r2_untrained": None if untrained is None else r_squared(untrained.error).tolist(),
                "r2_shuffled": self.shuffled, "partial": as_numbers(self.beyond), "extra_work": as_numbers(self.extra),
                "delta": self.delta, **{f"change_of_{name}": as_numbers(value) for name, value in self.changes.items()},
                "n_examples": int(self.read.sizes["example"])}


def _sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What may be quoted; every number comes from the rows."""
    told = []
    for word in ("decodable", "not decodable", "undecided"):
        if of := [row for row in rows if row["read"] == word]:
            told.append(f"After the last loop the noise level is {word} from a masked position's state: "
                        + "; ".join(f"{row['subject']} R² {in_words(row['r2_last'], '.2f')}" for row in of) + ".")
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
                        + "; ".join(f"{row['subject']} {in_words(row['extra_work'], '.3f')} nat more" for row in of)
                        + ".")
    return told
