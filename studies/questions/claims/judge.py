"""The paper's claims (2605.26106) judged: a number with an interval, and holds / does not / undecided.

Every claim is put as one or more quantities that exceed a stated bound by at least a smallest effect if it
holds. Intervals are 95%: Student's t over seeds where there are at least two (of the logarithm, for ratios),
else a bootstrap over held-out examples, and the text says which; they are cut to the values that the quantity
can take. A claim holds if the whole interval of each of its quantities is above bound plus smallest effect,
does not if that of any of them is below, and is undecided otherwise.

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
SMALLEST_NAT = 0.001
"""Smallest difference of NELBO or NLL that counts, nats per token."""
SMALLEST_SHARE = 0.005
"""Smallest difference of an accuracy, or of a share of attention, that counts."""
SMALLEST_RATIO = 0.05
"""A ratio of FLOPs counts as more than 1 from 1 plus this."""
ROUNDING = 1e-6
"""Values nearer to each other than this are equal: means of single-precision numbers are no more exact."""
RESAMPLES = 2000
TAIL = 0.025
"""Probability on either side of an interval."""

Word = Literal["holds here", "does not hold here", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A number with a 95% interval (NaN where there is none), and the bound it must exceed by ``smallest``."""

    label: str
    value: float
    low: float
    high: float
    over: str                 # what the interval is over: "3 seeds", "256 examples", "one seed"
    bound: float | None = 0   # None: told, not judged
    per_cent: bool = False    # shown as percentage points
    smallest: float = 0       # smallest effect that counts: what the bound must be exceeded by
    sign: Literal["", "<", ">"] = ""    # the value itself is known only as a bound

    @property
    def word(self) -> Word:
        if self.bound is None:
            return "undecided"
        least = self.bound + self.smallest
        if self.low > least + ROUNDING:
            return "holds here"
        if self.high < least - ROUNDING:
            return "does not hold here"
        return "undecided"

    @property
    def estimate(self) -> str:
        """The value in words, with its unit if it has one."""
        if math.isnan(self.value):
            return "unknown"
        scale, unit = (100, " points") if self.per_cent else (1, "")
        return f"{self.sign} {scale * self.value:.3g}{unit}".strip()

    @property
    def interval(self) -> str:
        """The interval in words."""
        if math.isnan(self.low):
            return "no interval"
        scale = 100 if self.per_cent else 1
        return (f"above {scale * self.low:.3g}" if math.isinf(self.high)
                else f"{scale * self.low:.3g} to {scale * self.high:.3g}")

    @property
    def text(self) -> str:
        return f"{self.label}: {self.estimate} ({self.interval}, {self.over})"


@dataclass(frozen=True)
class Judgement:
    """One claim, what was found, and the verdict."""

    letter: str
    claim: str
    quantities: tuple[Estimate, ...]
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
        """As JSON, which has neither NaN nor infinity: None and "inf" instead."""
        listed = [{**{key: _as_json(value) for key, value in asdict(q).items()}, "word": q.word}
                  for q in self.quantities]
        return {"letter": self.letter, "claim": self.claim, "word": self.word, "note": self.note,
                "missing": self.missing, "quantities": listed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Judgement:
        """The inverse of `to_dict`."""
        quantities = []
        for saved in values["quantities"]:
            known: dict[str, Any] = {key: value for key, value in saved.items() if key != "word"}
            for key in ("value", "low", "high"):
                known[key] = math.nan if known[key] is None else float(known[key])
            quantities.append(Estimate(**known))
        return cls(values["letter"], values["claim"], tuple(quantities), values["note"], values["missing"])


def quantity(label: str, values: xr.DataArray, *, limits: tuple[float, float] = (-math.inf, math.inf),
             statistic: Callable[[np.ndarray], np.ndarray] | None = None, **options: Any) -> Estimate:
    """Mean and interval of an array with axis ``seed``, and ``example`` where examples were measured one by one.

    Examples in which the value is undefined (NaN) are left out, and seeds of which it was not measured. The
    interval never leaves ``limits``, between which the quantity lies by its definition. ``statistic`` takes means
    [..., part] to the quantity [...] where it is not a mean itself; ``values`` then has an axis ``part``, too.

    Seeds that differ by rounding alone say nothing about other seeds, so the examples are asked instead. Where they
    do not differ either, at most a share p of examples is otherwise, with (1 − p)^n = 2.5%: the interval is what
    that share could move the mean by, and none if the quantity has no limits.
    """
    of = statistic if statistic is not None else _only_part
    parts = values if statistic is not None else values.expand_dims(part=1)
    by_seed = of((parts.mean("example") if "example" in parts.dims else parts).transpose("seed", "part").values)
    measured = ~np.isnan(by_seed)
    by_seed = by_seed[measured]
    n = len(by_seed)
    if not n:
        raise ValueError(f"{label}: there is nothing but NaN to judge.")
    low, high, over = math.nan, math.nan, "one seed" if n == 1 else f"{n} seeds"
    if n > 1 and np.ptp(by_seed) > ROUNDING:
        low, high = _student(by_seed)
    elif "example" in parts.dims:
        sample = parts.isel(seed=np.flatnonzero(measured)).mean("seed").transpose("example", "part").values
        sample = sample[~np.isnan(sample).any(1)]
        over += f"{' without spread' if n > 1 else ''}, over {len(sample)} examples"
        low, high = _over_examples(sample, of, limits)
    elif n > 1:
        over += " without spread"
    return Estimate(label, float(by_seed.mean()), float(np.clip(low, *limits)), float(np.clip(high, *limits)), over,
                    **options)


def ratio_quantity(label: str, ratio: xr.DataArray, side: xr.DataArray, **options: Any) -> Estimate:
    """A positive ratio over axis ``seed``, and its interval.

    ``side`` (seed) is −1 where the ratio is known only to be below its value, 1 where above, and 0 where it is exact.
    Ratios known exactly: geometric mean, and Student's t interval of the logarithm. With bounds among them: the
    median, which a bound leaves defined, and its interval from order statistics, which takes six seeds.
    """
    known = ratio.notnull().values
    values, sides = ratio.values[known], side.values[known]
    n, bounds = len(values), int((sides != 0).sum())
    if not n:
        raise ValueError(f"{label}: there is nothing but NaN to judge.")
    low, high, over = math.nan, math.nan, "one seed" if n == 1 else f"{n} seeds"
    if not bounds:
        logs = np.log(values)
        if n > 1:
            over = f"geometric mean of {over}"
            if np.ptp(logs) > ROUNDING:
                low, high = map(math.exp, _student(logs))
        return Estimate(label, math.exp(logs.mean()), low, high, over, **options)
    if n > 1:
        over = f"median of {over}, {bounds} of them a bound"
    lows, highs = np.sort(np.where(sides < 0, 0, values)), np.sort(np.where(sides > 0, np.inf, values))
    rank = int(stats.binom.ppf(TAIL, n, 0.5))   # P(fewer than this many seeds below the median) ≤ 2.5%
    if rank:
        low, high = lows[rank - 1], highs[n - rank]
    with np.errstate(divide="ignore"):   # a ratio that may be 0
        least, most = (float(np.exp(np.median(np.log(ends)))) for ends in (lows, highs))
    if least == most:
        return Estimate(label, most, low, high, over, **options)
    if math.isfinite(most):
        return Estimate(label, most, low, high, over, sign="<", **options)
    return Estimate(label, least or math.nan, low, high, over, sign=">", **options)


def judge(pooled: Mapping[str, xr.Dataset]) -> dict[str, Judgement]:
    """Claims (a) to (g) from measurements with a ``seed`` axis (see `measure.measure`)."""
    found = {}
    for letter, function in _CLAIMS.items():
        found[letter] = function(letter, pooled)
    return found


def _training(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = ("The twin needs more training FLOPs than the LoopMDM to reach the twin's final NELBO "
             "(paper: 2.3 to 3.3 times as many).")
    ratio, side = pooled["training"].flops_ratio, pooled["training"].flops_ratio_side
    if "twin" not in ratio.kind:
        return Judgement(letter, claim, (), missing="no twin was trained.")
    twins = {kind: name for kind, name in (("twin", "twin"), ("deep", "deep twin")) if kind in ratio.kind}
    quantities = [ratio_quantity(f"{name}'s FLOPs ÷ LoopMDM's", ratio.sel(kind=kind), side.sel(kind=kind),
                                 bound=1 if kind == "twin" else None, smallest=SMALLEST_RATIO)
                  for kind, name in twins.items()]
    notes = [_bounds_in_words(side.sel(kind=kind), name) for kind, name in twins.items()]
    if (side.sel(kind="twin") >= 0).any():
        notes.append("The LoopMDM's learning rate is still high where it crosses the twin's last value, so a run tuned "
                     "to stop there would need fewer FLOPs.")
    return Judgement(letter, claim, tuple(quantities), " ".join(filter(None, notes)))


def _bounds_in_words(side: xr.DataArray, name: str) -> str:
    """In how many seeds a ratio is only a bound, and why."""
    n, never, at_once = int(side.notnull().sum()), int((side < 0).sum()), int((side > 0).sum())
    sentences = []
    if never:
        sentences.append(f"The LoopMDM never reaches the {name}'s last NELBO in {_of(never, n)}; there the ratio of "
                         "the whole trainings is an upper bound.")
    if at_once:
        sentences.append(f"The LoopMDM has the {name}'s last NELBO at its first evaluation in {_of(at_once, n)}; "
                         "there the ratio of the FLOPs by then is a lower bound.")
    return " ".join(sentences)


def _of(count: int, n: int) -> str:
    return "the one seed" if n == 1 else f"{count} of {n} seeds"


def _deep(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = "The LoopMDM beats the deeper unlooped model of the same per-step compute, at equal training FLOPs."
    data = pooled["loops"]
    if "deep" not in data.kind:
        return Judgement(letter, claim, (), missing="no deep twin was trained.")
    at_max = {name: data[name].sel(kind="loop", n_loops=_s_max(data)) for name in ("nelbo", "exact", "cells")}
    once = {kind: data.sel(kind=kind, n_loops=1) for kind in data.kind.values}
    quantities = [
        quantity("NELBO, deep twin − LoopMDM [nat]", once["deep"].nelbo - at_max["nelbo"],
                 smallest=SMALLEST_NAT),
        quantity("exact accuracy, LoopMDM − deep twin", at_max["exact"] - once["deep"].exact, **_POINTS),
        quantity("cells right, LoopMDM − deep twin", at_max["cells"] - once["deep"].cells, **_TOLD_POINTS)]
    if "twin" in once:
        quantities.append(quantity("exact accuracy, LoopMDM − twin", at_max["exact"] - once["twin"].exact,
                                   **_TOLD_POINTS))
    return Judgement(letter, claim, tuple(quantities))


def _over_loops(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = "At S = 1 the LoopMDM is worse than its twin, and twice S_max still improves on S_max."
    data = pooled["loops"]
    s_max = _s_max(data)
    loop = data.sel(kind="loop")
    more = [loop.nelbo.sel(n_loops=s_max) - loop.nelbo.sel(n_loops=2 * s_max),
            loop.exact.sel(n_loops=2 * s_max) - loop.exact.sel(n_loops=s_max),
            loop.exact.sel(n_loops=4 * s_max) - loop.exact.sel(n_loops=s_max)]
    quantities = [quantity(f"NELBO, S = {s_max} − S = {2 * s_max} [nat]", more[0], smallest=SMALLEST_NAT),
                  quantity(f"exact accuracy, S = {2 * s_max} − S = {s_max}", more[1], **_TOLD_POINTS),
                  quantity(f"exact accuracy, S = {4 * s_max} − S = {s_max}", more[2], **_TOLD_POINTS)]
    if "twin" not in data.kind:
        return Judgement(letter, claim, tuple(quantities), missing="no twin was trained.")
    twin = loop.nelbo.sel(n_loops=1) - data.nelbo.sel(kind="twin", n_loops=1)
    return Judgement(letter, claim, (quantity("NELBO, S = 1 − twin [nat]", twin, smallest=SMALLEST_NAT), *quantities))


def _noise(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    gain = pooled["noise"].gain
    middle = gain.sel(t=[0.4, 0.5, 0.6]).mean("t", skipna=True)
    by_level = gain.mean([d for d in gain.dims if d != "t"])
    best = [f"{t:g}" for t in by_level.t.values[(by_level >= by_level.max() - SMALLEST_NAT).values]]
    where = " and ".join(filter(None, [", ".join(best[:-1]), best[-1]]))
    return Judgement(letter, "The gain from looping concentrates at intermediate noise levels t.", (
        quantity("gain at t = 0.4 to 0.6 − gain at t = 0.1 [nat]", middle - gain.sel(t=0.1), smallest=SMALLEST_NAT),
        quantity("gain at t = 0.4 to 0.6 − gain at t = 1 [nat]", middle - gain.sel(t=1.0), smallest=SMALLEST_NAT)),
        f"The gain is largest at t = {where}.")


def _attention(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    flow = pooled["attention"].flow
    s_max = flow.sizes["loop"] // 2
    growth = flow.sel(loop=s_max) - flow.sel(loop=1)
    after = flow.sel(loop=2 * s_max) - flow.sel(loop=s_max)
    both = xr.concat([growth, after], "part")
    return Judgement(letter, "Mask-to-mask attention grows with the loop and saturates near S_max.", (
        quantity(f"share of attention, loop {s_max} − loop 1", growth, limits=(-1, 1), smallest=SMALLEST_SHARE),
        quantity(f"half that change − change from loop {s_max} to {2 * s_max} (positive: saturated)", both,
                 limits=(-1, 0.5), statistic=lambda parts: abs(parts[..., 0]) / 2 - abs(parts[..., 1]))))


def _adaptive(letter: str, pooled: Mapping[str, xr.Dataset]) -> Judgement:
    claim = ("Adaptive looping saves loops at equal quality (paper: 12 → about 5); here: at least a quarter of S_max "
             "loops, losing at most half a point of cells and one of examples.")
    data = pooled["adaptive"]
    s_max = float(data.loops_used.sel(threshold=0).max())
    lost = {name: (data[name].sel(threshold=0) - data[name]).mean(["seed", "example"]).values
            for name in ("cells", "exact")}
    equal = _negligible(lost["cells"], lost["exact"])
    best = float(data.threshold.values[equal].max())   # τ = 0 loses nothing
    chosen = data.sel(threshold=best)
    loop = pooled["loops"].sel(kind="loop")
    gained = {name: float((loop[name].sel(n_loops=int(s_max)) - loop[name].sel(n_loops=1)).mean())
              for name in ("cells", "exact")}
    vacuous = bool(_negligible(gained["cells"], gained["exact"]))
    missing = "S_max loops are no better than one by these measures: stopping early has nothing to lose." * vacuous
    return Judgement(letter, claim, (
        quantity("share of loops saved", 1 - chosen.loops_used / s_max, limits=(0, 1 - 1 / s_max),
                 bound=WORTHWHILE_SAVING),
        quantity("loops used", chosen.loops_used, limits=(1, s_max), bound=None),
        quantity("cells lost", data.cells.sel(threshold=0) - chosen.cells, **_TOLD_POINTS),
        quantity("exact accuracy lost", data.exact.sel(threshold=0) - chosen.exact, **_TOLD_POINTS)),
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
                 data.equal_exact.isel(plan=at_max) - data.equal_exact.isel(plan=at_one), **_POINTS),
        quantity(f"gain of {s_max} loops over 1 with {few} steps − with {many}",
                 gain.sel(n_steps=few) - gain.sel(n_steps=many), **{**_POINTS, "limits": (-2, 2)})))


def _s_max(data: xr.Dataset) -> int:
    return int(data.n_loops.values[-1]) // 4


def _negligible(cells: Any, exact: Any) -> Any:
    """Whether a difference of cells right and of examples right is none of quality."""
    return (cells <= EQUAL_QUALITY + ROUNDING) & (exact <= 2 * EQUAL_QUALITY + ROUNDING)


def _only_part(parts: np.ndarray) -> np.ndarray:
    return parts[..., 0]


def _student(sample: np.ndarray) -> tuple[float, float]:
    """Student's t interval of the mean of [n]."""
    half = stats.t.ppf(1 - TAIL, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def _over_examples(sample: np.ndarray, of: Callable[[np.ndarray], np.ndarray],
                   limits: tuple[float, float]) -> tuple[float, float]:
    """Bootstrap interval of a statistic of the means of [example, part]; see `quantity` for examples all alike."""
    n = len(sample)
    if (np.ptp(sample, axis=0) > ROUNDING).any():
        draws = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
        low, high = np.percentile(of(sample[draws].mean(1)), [100 * TAIL, 100 * (1 - TAIL)])
        return float(low), float(high)
    if not all(map(math.isfinite, limits)):
        return math.nan, math.nan
    value, other = float(of(sample.mean(0))), 1 - TAIL ** (1 / n)
    return value - other * (value - limits[0]), value + other * (limits[1] - value)


def _as_json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


_POINTS: dict[str, Any] = {"per_cent": True, "limits": (-1, 1), "smallest": SMALLEST_SHARE}
"""Options of a difference of accuracies that is judged."""
_TOLD_POINTS: dict[str, Any] = {**_POINTS, "bound": None}
"""And of one that is told, not judged."""

_CLAIMS: dict[str, Callable[[str, Mapping[str, xr.Dataset]], Judgement]] = {
    "a": _training, "b": _deep, "c": _over_loops, "d": _noise, "e": _attention, "f": _adaptive, "g": _sampling}
