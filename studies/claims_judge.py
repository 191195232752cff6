"""The paper's claims (2605.26106) judged: a number with an interval, and holds / does not / undecided.

Every claim is put as one or more quantities that are positive (or above a stated bound) if it
holds. Intervals are 95%: Student's t over seeds where there are at least two, else a bootstrap
over held-out examples, and the text says which. A claim holds if the whole interval of each of
its quantities is above the bound, does not if that of any of them is below, and is undecided otherwise.

    judgements = judge(pooled)
    judgements["c"].word, judgements["c"].quantities[0].value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy import stats

EQUAL_QUALITY = 0.005
"""Adaptive looping keeps the quality if it loses at most this share of free cells, and twice as much of examples."""
WORTHWHILE_SAVING = 0.25
"""Adaptive looping is worth it from this share of loops saved."""
RESAMPLES = 2000

Word = Literal["holds here", "does not hold here", "undecided"]


@dataclass(frozen=True)
class Quantity:
    """A number with a 95% interval (NaN where there is none), and the bound it must exceed."""

    label: str
    value: float
    low: float
    high: float
    over: str                 # what the interval is over: "3 seeds", "256 examples", "one seed"
    bound: float | None = 0   # None: told, not judged
    per_cent: bool = False    # shown as percentage points

    @property
    def word(self) -> Word:
        if self.bound is not None and self.low > self.bound:
            return "holds here"
        if self.bound is not None and self.high < self.bound:
            return "does not hold here"
        return "undecided"

    @property
    def text(self) -> str:
        scale, unit = (100, " points") if self.per_cent else (1, "")
        interval = "no interval" if math.isnan(self.low) else f"{scale * self.low:.3g} to {scale * self.high:.3g}"
        return f"{self.label}: {scale * self.value:.3g}{unit} ({interval}, {self.over})"


@dataclass(frozen=True)
class Judgement:
    """One claim, what was found, and the verdict."""

    letter: str
    claim: str
    quantities: tuple[Quantity, ...]
    note: str = ""
    missing: str = ""   # why it could not be measured

    @property
    def word(self) -> Word:
        words = [q.word for q in self.quantities if q.bound is not None]
        if not words or self.missing:
            return "undecided"
        if "does not hold here" in words:
            return "does not hold here"
        return "holds here" if set(words) == {"holds here"} else "undecided"

    @property
    def in_part(self) -> bool:
        """Whether some of it holds and some does not."""
        return {"holds here", "does not hold here"} <= {q.word for q in self.quantities}

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which has no NaN: None instead."""
        listed = [{**{key: None if isinstance(value, float) and math.isnan(value) else value
                      for key, value in asdict(q).items()}, "word": q.word} for q in self.quantities]
        return {"letter": self.letter, "claim": self.claim, "word": self.word, "note": self.note,
                "missing": self.missing, "quantities": listed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Judgement:
        """The inverse of `to_dict`."""
        quantities = []
        for saved in values["quantities"]:
            known: dict[str, Any] = {key: value for key, value in saved.items() if key != "word"}
            for key in ("value", "low", "high"):
                known[key] = math.nan if known[key] is None else known[key]
            quantities.append(Quantity(**known))
        return cls(values["letter"], values["claim"], tuple(quantities), values["note"], values["missing"])


def quantity(label: str, values: xr.DataArray, **options: Any) -> Quantity:
    """Mean and interval of an array with axis ``seed``, and ``example`` where examples were measured one by one.

    Examples in which the value is undefined (NaN) are left out, and seeds of which it was not measured.
    """
    by_seed = (values.mean("example") if "example" in values.dims else values).values
    by_seed = by_seed[~np.isnan(by_seed)]
    if not len(by_seed):
        raise ValueError(f"{label}: there is nothing but NaN to judge.")
    if len(by_seed) > 1:
        over = f"{len(by_seed)} seeds"
        half = stats.t.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / math.sqrt(len(by_seed))
        low, high = by_seed.mean() - half, by_seed.mean() + half
    elif "example" in values.dims:
        sample = values.values.ravel()
        sample = sample[~np.isnan(sample)]
        over = f"one seed, over {len(sample)} examples"
        draws = np.random.default_rng(0).integers(0, len(sample), (RESAMPLES, len(sample)))
        low, high = np.percentile(sample[draws].mean(1), [2.5, 97.5])
    else:
        over, low, high = "one seed", math.nan, math.nan
    return Quantity(label, float(by_seed.mean()), float(low), float(high), over, **options)


def judge(pooled: Mapping[str, xr.Dataset]) -> dict[str, Judgement]:
    """Claims (a) to (g) from measurements with a ``seed`` axis (see `claims_measure.measure`)."""
    found = {}
    for letter, function in _CLAIMS.items():
        found[letter] = function(letter, pooled)
    return found


def _training(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = ("The twin needs more training FLOPs than the LoopMDM to reach the twin's final NELBO "
             "(paper: 2.3 to 3.3 times as many).")
    ratio = pooled["training"].flops_ratio
    if "twin" not in ratio.kind:
        return Judgement(letter, claim, (), missing="no twin was trained.")
    quantities = [quantity("twin's FLOPs ÷ LoopMDM's", ratio.sel(kind="twin"), bound=1)]
    if "deep" in ratio.kind:
        quantities.append(quantity("deep twin's FLOPs ÷ LoopMDM's", ratio.sel(kind="deep"), bound=None))
    never = [f"the {name}'s in {count} of {int(ratio.sel(kind=kind).notnull().sum())} seeds"
             for kind, name in (("twin", "twin"), ("deep", "deep twin"))
             if kind in ratio.kind and (count := int((ratio.sel(kind=kind) == 0).sum()))]
    note = f"The LoopMDM never reaches {' and '.join(never)} (counted as 0). " if never else ""
    if (ratio.sel(kind="twin") > 0).any():
        note += ("The LoopMDM's learning rate is still high where it crosses the twin's last value, so a run tuned to "
                 "stop there would need fewer FLOPs.")
    return Judgement(letter, claim, tuple(quantities), note.strip())


def _deep(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = "The LoopMDM beats the deeper unlooped model of the same per-step compute, at equal training FLOPs."
    data = pooled["loops"]
    if "deep" not in data.kind:
        return Judgement(letter, claim, (), missing="no deep twin was trained.")
    at_max = {name: data[name].sel(kind="loop", n_loops=_s_max(data)) for name in ("nelbo", "exact", "cells")}
    once = {kind: data.sel(kind=kind, n_loops=1) for kind in data.kind.values}
    quantities = [
        quantity("NELBO, deep twin − LoopMDM [nat]", once["deep"].nelbo - at_max["nelbo"]),
        quantity("exact accuracy, LoopMDM − deep twin", at_max["exact"] - once["deep"].exact, per_cent=True),
        quantity("cells right, LoopMDM − deep twin", at_max["cells"] - once["deep"].cells, per_cent=True, bound=None)]
    if "twin" in once:
        quantities.append(quantity("exact accuracy, LoopMDM − twin", at_max["exact"] - once["twin"].exact,
                                   per_cent=True, bound=None))
    return Judgement(letter, claim, tuple(quantities))


def _over_loops(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = "At S = 1 the LoopMDM is worse than its twin, and twice S_max still improves on S_max."
    data = pooled["loops"]
    s_max = _s_max(data)
    loop = data.sel(kind="loop")
    more = [loop.nelbo.sel(n_loops=s_max) - loop.nelbo.sel(n_loops=2 * s_max),
            loop.exact.sel(n_loops=2 * s_max) - loop.exact.sel(n_loops=s_max),
            loop.exact.sel(n_loops=4 * s_max) - loop.exact.sel(n_loops=s_max)]
    quantities = [quantity(f"NELBO, S = {s_max} − S = {2 * s_max} [nat]", more[0]),
                  quantity(f"exact accuracy, S = {2 * s_max} − S = {s_max}", more[1], per_cent=True, bound=None),
                  quantity(f"exact accuracy, S = {4 * s_max} − S = {s_max}", more[2], per_cent=True, bound=None)]
    if "twin" not in data.kind:
        return Judgement(letter, claim, tuple(quantities), missing="no twin was trained.")
    twin = loop.nelbo.sel(n_loops=1) - data.nelbo.sel(kind="twin", n_loops=1)
    return Judgement(letter, claim, (quantity("NELBO, S = 1 − twin [nat]", twin), *quantities))


def _noise(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    gain = pooled["noise"].gain
    middle = gain.sel(t=[0.4, 0.5, 0.6]).mean("t", skipna=True)
    best = float(gain.mean([d for d in gain.dims if d != "t"]).idxmax("t"))
    return Judgement(letter, "The gain from looping concentrates at intermediate noise levels t.", (
        quantity("gain at t = 0.4 to 0.6 − gain at t = 0.1 [nat]", middle - gain.sel(t=0.1)),
        quantity("gain at t = 0.4 to 0.6 − gain at t = 1 [nat]", middle - gain.sel(t=1.0))),
        f"The gain is largest at t = {best:g}.")


def _attention(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    flow = pooled["attention"].flow
    s_max = flow.sizes["loop"] // 2
    growth = flow.sel(loop=s_max) - flow.sel(loop=1)
    after = flow.sel(loop=2 * s_max) - flow.sel(loop=s_max)
    slack = abs(growth.mean("example")) / 2 - abs(after.mean("example"))
    return Judgement(letter, "Mask-to-mask attention grows with the loop and saturates near S_max.", (
        quantity(f"share of attention, loop {s_max} − loop 1", growth),
        quantity(f"half that change − change from loop {s_max} to {2 * s_max} (positive: saturated)", slack,
                 bound=0 if flow.sizes["seed"] > 1 else None)))


def _adaptive(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = ("Adaptive looping saves loops at equal quality (paper: 12 → about 5); here: at least a quarter of S_max "
             "loops, losing at most half a point of cells and one of examples.")
    data = pooled["adaptive"]
    s_max = float(data.loops_used.sel(threshold=0).max())
    lost = {name: (data[name].sel(threshold=0) - data[name]).mean(["seed", "example"]).values
            for name in ("cells", "exact")}
    equal = (lost["cells"] <= EQUAL_QUALITY) & (lost["exact"] <= 2 * EQUAL_QUALITY)
    best = float(data.threshold.values[equal].max())   # τ = 0 loses nothing
    chosen = data.sel(threshold=best)
    loop = pooled["loops"].sel(kind="loop")
    gained = {name: float((loop[name].sel(n_loops=int(s_max)) - loop[name].sel(n_loops=1)).mean())
              for name in ("cells", "exact")}
    vacuous = gained["cells"] <= EQUAL_QUALITY and gained["exact"] <= 2 * EQUAL_QUALITY
    missing = "S_max loops are no better than one by these measures: stopping early has nothing to lose." * vacuous
    return Judgement(letter, claim, (
        quantity("share of loops saved", 1 - chosen.loops_used / s_max, bound=WORTHWHILE_SAVING),
        quantity("loops used", chosen.loops_used, bound=None),
        quantity("cells lost", data.cells.sel(threshold=0) - chosen.cells, per_cent=True, bound=None),
        quantity("exact accuracy lost", data.exact.sel(threshold=0) - chosen.exact, per_cent=True, bound=None)),
        f"Threshold τ = {best:g} on the relative change of the state, S_max = {s_max:g}: the largest of those tried "
        "that keeps the quality.", missing)


def _sampling(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    data = pooled["sampling"]
    s_max = int(data.loops.values[-1])
    plans = list(zip(data.n_loops.values.tolist(), data.n_steps_of_plan.values.tolist(), strict=True))
    at_max, at_one = plans.index(next(p for p in plans if p[0] == s_max)), 0
    gain = data.steps_exact.isel(loops=-1) - data.steps_exact.isel(loops=0)
    few, many = int(data.n_steps.min()), int(data.n_steps.max())
    return Judgement(letter, "At equal total compute loops are worth more than denoising steps, and looping gains most "
                     "when steps are few.", (
        quantity(f"exact accuracy, {s_max} loops × {plans[at_max][1]} steps − 1 loop × {plans[at_one][1]} steps",
                 data.equal_exact.isel(plan=at_max) - data.equal_exact.isel(plan=at_one), per_cent=True),
        quantity(f"gain of {s_max} loops over 1 with {few} steps − with {many}",
                 gain.sel(n_steps=few) - gain.sel(n_steps=many), per_cent=True)))


def _s_max(data: xr.Dataset) -> int:
    return int(data.n_loops.values[-1]) // 4


_CLAIMS: dict[str, Callable[[str, Mapping[str, xr.Dataset]], Judgement]] = {
    "a": _training, "b": _deep, "c": _over_loops, "d": _noise, "e": _attention, "f": _adaptive, "g": _sampling}
