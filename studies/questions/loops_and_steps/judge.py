"""Loops × denoising steps in decisions and sentences: pure functions of what was measured.

    verdict = judge({"automaton": found}, {"automaton": (32,) * 6})
    verdict["rows"][0]["answer"]                              # "starts anew"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from probes.intervals import Claims, Interval
from probes.thresholds import THRESHOLDS, Thresholds
from studies.questions.subject_claims import SubjectClaims, as_numbers, estimate, in_words

QUESTION = "Does a denoising step continue where the loops of the step before ended?"

ANSWERS = {
    "starts anew": "a step's first loop can be done by the first loop of the step before, and not by a later one",
    "continues": "a step's first loop can be done by the later loops of the step before, and not by the first",
    "cannot be told": "a step's first loop can be done by the first loop of the step before and by the later ones: all "
                      "loops do the same",
    "nothing": "a step's first loop does no work",
    "undecided": "the intervals do not tell",
}
"""What the exchange between steps can say of a step's first loop."""

RESTARTS = {
    "as good": "a restart is as good as one more loop",
    "better": "a restart is better than one more loop",
    "worse": "a restart is worse than one more loop",
    "nothing to gain": "neither a restart nor one more loop changes the NLL",
    "undecided": "the intervals do not tell whether a restart is as good as one more loop",
}
"""What the restart test can say."""


def judge(found: Mapping[str, xr.Dataset], sizes: Mapping[str, Sequence[int]], *, thresholds: Thresholds = THRESHOLDS,
          n_resamples: int = 20_000, seed: int = 0) -> dict[str, Any]:
    """Rows, one per subject, and sentences; all claims are corrected together (Holm)."""
    claims = Claims(thresholds.level)
    cells = [_Cell(SubjectClaims(name, sizes[name], claims, n_resamples=n_resamples, seed=seed), data, thresholds)
             for name, data in found.items()]
    claims.settle()
    rows = [cell.row() for cell in cells]
    return {"question": QUESTION, "rows": rows, "words": _sentences(rows)}


class _Cell:
    """What is claimed of one subject, and what follows."""

    def __init__(self, claims: SubjectClaims, data: xr.Dataset, thresholds: Thresholds):
        self.claims, self.data = claims, data
        self.delta = max(thresholds.effect, thresholds.relative_effect * float(
            data.nll.sel(way="afresh").isel(loop_written=0).mean()))
        limits = {"above": thresholds.same, "below": thresholds.different}
        both = {"above": self.delta, "below": self.delta}
        around = {"above": self.delta, "below": -self.delta, "within": self.delta}
        work = claims.mean(data.work.isel(content=0))
        self.work = claims.claim("work", work, both)
        kl = claims.mean(data.kl.sel(step="before").isel(content=0))                              # [draw, operation]
        tau = np.clip(1 - kl / np.maximum(work, np.finfo(float).tiny)[:, None], -thresholds.clip, thresholds.clip)
        self.first = claims.claim("first", tau[:, 0], limits)
        self.later = claims.claim("later", tau[:, 1:].mean(1), limits)
        self.restarts: list[tuple[int, Interval, Interval, Interval, dict[str, float]]] = []
        nll = {way: claims.mean(data.nll.sel(way=way)) for way in data.way.values}                # [draw, loop]
        for k in data.loop_written.values:
            gain = claims.claim(f"gain {k}", nll["stay"][:, k] - nll["go on"][:, k], both)
            more = claims.claim(f"more {k}", nll["go on"][:, k] - nll["restart"][:, k], around)
            restart = estimate(nll["stay"][:, k] - nll["restart"][:, k])
            self.restarts.append((int(k), gain, restart, more, {way: float(nll[way][0, k]) for way in nll}))

    def answer(self) -> str:
        if self.claims.side("work") == "below":
            return "nothing"
        sides = self.claims.side("first"), self.claims.side("later")
        return {("above", "below"): "starts anew", ("below", "above"): "continues",
                ("above", "above"): "cannot be told"}.get(sides, "undecided")

    def restart(self, k: int) -> str:
        more = self.claims.side(f"more {k}")
        decision = {"within": "as good", "above": "better", "below": "worse", "": "undecided"}[more]
        if decision == "as good" and self.claims.side(f"gain {k}") == "below":
            return "nothing to gain"
        return decision

    def row(self) -> dict[str, Any]:
        restarts = [{"loop": k, "loop_gain": as_numbers(gain), "restart_gain": as_numbers(restart),
                     "difference": as_numbers(more), "nll": nll, "decision": self.restart(k)}
                    for k, gain, restart, more, nll in self.restarts]
        distance = self.data.distance.mean("example")
        nearest = distance.argmin("loop_before").values
        return {"subject": self.claims.name, "delta": self.delta, "work": as_numbers(self.work),
                "answer": self.answer(), "first": as_numbers(self.first), "later": as_numbers(self.later),
                "restarts": restarts, "nearest": [int(j) for j in nearest],
                "n_examples": int(self.data.sizes["example"])}


def _sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What may be quoted; every number comes from the rows."""
    told = []
    for answer, what in ANSWERS.items():
        if of := [row for row in rows if row["answer"] == answer]:
            told.append(f"{', '.join(str(row['subject']) for row in of)}: {answer} ({what}).")
    for decision, what in RESTARTS.items():
        if of := [row for row in rows if row["restarts"][0]["decision"] == decision]:
            named = "; ".join(f"{row['subject']} {in_words(row['restarts'][0]['difference'], '+.3f')} nat"
                              for row in of)
            told.append(f"After the first loop, {what}: {named}.")
    every = Counter(one["decision"] for row in rows for one in row["restarts"])
    told.append("Over all loops and subjects, restarts are "
                + ", ".join(f"{decision} {every[decision]} of {every.total()} times" for decision in RESTARTS
                            if every[decision]) + ".")
    worse = [row for row in rows
             if row["restarts"][0]["nll"]["other tokens"] > row["restarts"][0]["nll"]["restart"]]
    told.append("With the tokens of another example written the NLL is higher than with the model's own in "
                f"{len(worse)} of {len(rows)} subjects.")
    return told
