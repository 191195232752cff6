"""The rule of the stage test: from per-example measurements to decisions, with nothing of a model in it.

`Evidence` holds what was measured for one role and band of t; `judge` turns all evidence of a report into one
`Finding` per range of loops. Every claim that a decision rests on is a bootstrap p-value that holds after Holm's
correction over the whole report; what does not hold is not decided.

    findings = judge([evidence], thresholds=THRESHOLDS)
    findings[0].regime, findings[0].letters, findings[0].reason
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Literal

import numpy as np
from jaxtyping import Float

from probes.intervals import Claims, Interval, Resampling, Side, interval
from probes.thresholds import THRESHOLDS, Thresholds

Regime = Literal["iterating", "unrolled", "programme", "settled", "drifting", "nothing", "undecided"]
Operation = Literal["same", "changing", "programme", ""]

IDLE, UNKNOWN = "·", "?"
"""In a sequence of letters: a loop without work, and one whose letter is not decided."""


@dataclass(frozen=True)
class Exchanges:
    """Divergences of one kind of map: ``kl`` [content, operation, example] and ``work`` [content, example], nats."""

    kl: Float[np.ndarray, "content operation example"]
    work: Float[np.ndarray, "content example"]


@dataclass(frozen=True)
class Layers:
    """Exchanges of single layers, and where each stands: its loop and its layer in the loop."""

    exchanges: Exchanges
    loop: tuple[int, ...]
    layer: tuple[int, ...]
    sizes: tuple[int, ...]                              # examples of each training seed


@dataclass(frozen=True)
class Evidence:
    """What was measured for one role of the positions and one band of t."""

    role: str
    band: str
    sizes: tuple[int, ...]                              # examples of each training seed, one after another
    ranges: tuple[tuple[int, int], ...]                 # (first loop, loop after the last); the first is the main one
    loops: Exchanges
    prefix: Float[np.ndarray, "loops example"]          # NLL after 0 … K loops
    skip: Float[np.ndarray, "loop example"]             # NLL without the work of a loop
    line: Float[np.ndarray, "loops example"]            # NLL on the straight line; NaN below 3 loops
    aligned: Exchanges | None = None                    # in a drifting basis
    layers: Layers | None = None

    @property
    def n_loops(self) -> int:
        return len(self.loops.work)


@dataclass(frozen=True)
class Quantity:
    """A number of the report: its interval, its adjusted p-value and what could be said about it."""

    interval: Interval
    p: float
    side: Side


@dataclass(frozen=True)
class Finding:
    """What the rule makes of one cell: a role, a band of t and a range of loops."""

    role: str
    band: str
    loops: tuple[int, int]
    regime: Regime
    basis: Literal["fixed", "drifting"]
    letters: str
    stages: Literal["re-run", "not re-run", "one layer", "undecided", "not measured"]
    operation: Operation
    content: str
    idle: bool                                          # no loop of the range changes the answer
    enough: bool                                        # examples for a decision
    reason: str
    quantities: dict[str, Quantity] = field(default_factory=dict)


def judge(report: Sequence[Evidence], *, thresholds: Thresholds = THRESHOLDS, seed: int = 0) -> list[Finding]:
    """One finding per role, band and range of loops, in this order."""
    claims = Claims(thresholds.level)
    cells = []
    for evidence in report:
        drawn = _Drawn(evidence, thresholds, seed)
        cells += [_Cell(evidence, loops, claims, thresholds, drawn) for loops in evidence.ranges]
    claims.settle()
    return [cell.finding() for cell in cells]


# ------------------------------------------------------------------------------- cells

class _Drawn:
    """Means over examples, as they are and under every draw: index 0 is the estimate, the draws follow."""

    def __init__(self, evidence: Evidence, thresholds: Thresholds, seed: int):
        def draws(sizes: tuple[int, ...]) -> Resampling:
            return Resampling(sizes, n_resamples=thresholds.resamples, seed=seed)

        self._draws = draws(evidence.sizes)
        self._of_layers = self._draws if evidence.layers is None or evidence.layers.sizes == evidence.sizes else draws(
            evidence.layers.sizes)
        layers = None if evidence.layers is None else evidence.layers.exchanges
        self.exchanges = {"fixed": evidence.loops, "drifting": evidence.aligned, "layers": layers}
        self.work: dict[str, Float[np.ndarray, "draw content"]] = {}
        self.tau: dict[str, Float[np.ndarray, "draw content operation"]] = {}
        for name, measured in self.exchanges.items():
            if measured is not None:
                chosen = self._of_layers if name == "layers" else self._draws
                self.work[name] = _means(chosen, measured.work.T)
                self.tau[name] = 1 - _means(chosen, np.moveaxis(measured.kl, -1, 0)) / np.maximum(
                    self.work[name], np.finfo(float).tiny)[..., None]

    def mean(self, values: Float[np.ndarray, "example"]) -> Float[np.ndarray, "draw"]:
        return _means(self._draws, values)


class _Cell:
    """The claims of one role, band and range, and how the rule reads them."""

    def __init__(self, evidence: Evidence, loops: tuple[int, int], claims: Claims, thresholds: Thresholds,
                 drawn: _Drawn):
        self.evidence, self.loops, self.claims, self.thresholds, self.drawn = evidence, loops, claims, thresholds, drawn
        self.start, self.stop = loops
        self.range = range(*loops)
        self.key = (evidence.role, evidence.band)
        self.shown: dict[str, tuple[Interval, tuple]] = {}
        self.delta = max(thresholds.effect, thresholds.relative_effect * float(np.nanmean(evidence.prefix[1])))
        self.enough = min(evidence.sizes) >= thresholds.least_examples
        self._register_work()
        self._register_content()
        for basis in ("fixed", "drifting"):
            if basis in drawn.tau:
                self._register_operation(basis)
        if evidence.layers is not None:
            self._register_stages(evidence.layers)

    # ---- claims

    def _claim(self, name: str, values: Float[np.ndarray, "draw"], sides: Mapping[str, float], *,
               shared: bool = False) -> None:
        """A claim on a quantity, given its estimate and then its draws; a shared one is the same for all ranges."""
        key = self._key(name, shared)
        if not shared:
            self.shown[name] = (interval(float(values[0]), values[1:]), key)
        if key not in self.claims:
            self.claims.add(key, values[1:], **sides)

    def _key(self, name: str, shared: bool) -> tuple:
        return (*self.key, name) if shared else (*self.key, *self.loops, name)

    def _side(self, name: str) -> Side:
        return self.claims.side(self._key(name, shared=False))

    def _register_work(self) -> None:
        work, both = self.drawn.work["fixed"], {"above": self.delta, "below": self.delta}
        for k in self._members():
            self._claim(f"work {k}", work[:, k], both, shared=True)
        self._claim("work", work[:, self.start:self.stop].mean(1), both)

    def _register_content(self) -> None:
        prefix, skip, line = self.evidence.prefix, self.evidence.skip, self.evidence.line
        mean, final = self.drawn.mean, self.evidence.prefix[-1]
        both = {"above": self.delta, "below": self.delta}
        around = {"above": self.delta, "below": -self.delta, "within": self.delta}
        self._claim("gain", mean(prefix[self.start] - prefix[self.stop]) / len(self.range), around)
        self._claim("worth", mean((skip[self.start:self.stop] - final).mean(0)), around)
        self._claim("whole gain", mean(prefix[1] - final), both)
        if self.start:
            self._claim("earlier gain", mean(prefix[0] - prefix[self.start]), both)
            self._claim("earlier worth", mean((skip[:self.start] - final).mean(0)), both)
        if np.isfinite(line[self.stop]).any():
            self._claim("beyond the line", mean(line[self.stop] - prefix[self.stop]), both)

    def _register_operation(self, basis: str) -> None:
        limits = self._limits(basis)
        for i, j in combinations(self._members(), 2):
            lesser, larger = self._of_pair(basis, i, j)
            self._claim(f"{basis} {i} {j} both", lesser, limits, shared=True)
            self._claim(f"{basis} {i} {j} either", larger, {"below": limits["below"]}, shared=True)
        pairs = [(i, j) for i, j in product(self.range, repeat=2) if i != j]
        if pairs:
            self._claim(_mean_name(basis), self._weighted(basis, pairs), limits)
            if self.start:
                first = [pair for k in self.range for pair in ((0, k), (k, 0))]
                self.claims.add(self._key(f"{basis} first", shared=False), self._weighted(basis, first)[1:], **limits)

    def _limits(self, basis: str) -> dict[str, float]:
        """Above which τ two loops do the same, and below which they do not. A basis is fitted to make them agree."""
        if basis == "fixed":
            return {"above": self.thresholds.same, "below": self.thresholds.different}
        return {"above": self.thresholds.same_fitted, "below": self.thresholds.different_fitted}

    def _of_pair(self, basis: str, i: int, j: int) -> tuple[Float[np.ndarray, "draw"], Float[np.ndarray, "draw"]]:
        """τ of two loops, the lesser and the larger of both directions; their mean, twice, in a fitted basis, where one
        pair of maps has to serve both."""
        one, other = self.drawn.tau[basis][:, i, j], self.drawn.tau[basis][:, j, i]
        if basis == "fixed":
            return np.minimum(one, other), np.maximum(one, other)
        clip = self.thresholds.clip
        mean = (np.clip(one, -clip, clip) + np.clip(other, -clip, clip)) / 2
        return mean, mean

    def _register_stages(self, layers: Layers) -> None:
        inside = [p for p, loop in enumerate(layers.loop) if loop in self.range]
        pairs = [(p, q) for p, q in product(inside, repeat=2) if layers.loop[p] != layers.loop[q]
                 and np.isfinite(layers.exchanges.kl[p, q]).any()]
        limits = {"above": self.thresholds.same, "below": self.thresholds.different}
        for name, alike in (("same-layer tau", True), ("other-layer tau", False)):
            if chosen := [(p, q) for p, q in pairs if (layers.layer[p] == layers.layer[q]) == alike]:
                self._claim(name, self._weighted("layers", chosen), limits)

    def _weighted(self, which: str, pairs: Sequence[tuple[int, int]]) -> Float[np.ndarray, "draw"]:
        """Mean τ of the pairs, cut to ±clip, weighted by the work that is to be replaced."""
        rows, columns = np.array(pairs).T
        value = np.clip(self.drawn.tau[which][:, rows, columns], -self.thresholds.clip, self.thresholds.clip)
        weight = np.maximum(self.drawn.work[which][:, rows], np.finfo(float).tiny)
        return (value * weight).sum(1) / weight.sum(1)

    def _members(self) -> list[int]:
        """The loops whose letters matter to this range: its own, and loop 0."""
        return sorted({0, *self.range})

    # ---- the rule

    def finding(self) -> Finding:
        evidence = self.evidence
        quantities = {name: Quantity(found, self.claims.p(key), self.claims.side(key))
                      for name, (found, key) in self.shown.items()}

        def found(regime: Regime, reason: str, *, basis: Literal["fixed", "drifting"] = "fixed",
                  letters: str = "", operation: Operation = "", content: str = "", idle: bool = False) -> Finding:
            return Finding(evidence.role, evidence.band, self.loops, regime, basis, letters or self._letters(None),
                           self._stages(), operation, content, idle, self.enough, reason, quantities)

        if not self.enough:
            return found("undecided", f"{min(evidence.sizes)} examples are too few: the rule asks for "
                                      f"{self.thresholds.least_examples}")
        if all(self._idle(k) for k in self.range):
            if self._side("gain") == "above":
                return found("undecided", "the loops improve the answer together and none of them is needed for it: "
                                          "what they do is only seen with fewer loops (n_loops=…)", idle=True)
            return found(*self._without_work("no loop of the range changes the answer"), idle=True)
        if self._side("whole gain") == "below" and all(self._side(name) in ("within", "below")
                                                       for name in ("gain", "worth")):
            return found(*self._without_work("the loops change the answer and do not improve it"), idle=True)
        content, why = self._content()
        operation, basis, classes = self._operation()
        letters = self._letters(classes)
        missing = []
        if content == "nothing new" and not self._ever_improved():
            content, why = "", "whether any loop improved the answer"
        if not operation:
            missing.append("whether the loops do the same")
        if not content:
            missing.append(why)
        if missing:
            return found("undecided", "not decided: " + "; ".join(missing), basis=basis, letters=letters,
                         operation=operation, content=content)
        regimes: dict[tuple[str, str], Regime] = {
            ("same", "advances"): "iterating", ("changing", "advances"): "unrolled",
            ("programme", "advances"): "programme", ("same", "nothing new"): "settled",
            ("changing", "nothing new"): "drifting"}
        regime = regimes.get((operation, content), "undecided")
        return found(regime, f"operation: {operation}{' in a drifting basis' if basis == 'drifting' else ''}; "
                             f"content: {content} ({why})", basis=basis, letters=letters, operation=operation,
                     content=content)

    def _without_work(self, why: str) -> tuple[Regime, str]:
        if not self.start:
            return "nothing", why
        earlier = (self._side("earlier gain"), self._side("earlier worth"))
        if "above" in earlier:
            return "settled", f"{why}; earlier loops improved it"
        if earlier == ("below", "below"):
            return "nothing", f"{why}; earlier loops did not improve it either"
        return "undecided", f"{why}; not decided: whether earlier loops improved it"

    def _ever_improved(self) -> bool:
        """Did the loops, or earlier ones, improve the answer? Else it has not settled: there was nothing to settle."""
        return "above" in [self._side(name) for name in ("whole gain", "earlier gain", "earlier worth")
                           if name in self.shown]

    def _content(self) -> tuple[str, str]:
        gain, worth = self._side("gain"), self._side("worth")
        if "above" in (gain, worth):
            if "beyond the line" in self.shown and worth != "above":
                beyond = self._side("beyond the line")
                if beyond == "below":
                    return "nothing new", "a straight line through the first loops does as well"
                if not beyond:
                    return "", "whether the loops beat a straight line"
            return "advances", "gain per loop" if gain == "above" else "worth of the loops to the final answer"
        if gain in ("within", "below") and worth in ("within", "below"):
            return "nothing new", "gain per loop" if gain == "within" else "the answer gets worse"
        return "", "whether the loops improve the answer"

    def _operation(self) -> tuple[Operation, Literal["fixed", "drifting"], list[set[int]] | None]:
        fixed, classes = self._in("fixed")
        if fixed == "same" or "drifting" not in self.drawn.tau:
            return fixed, "fixed", classes
        either, joined = self._in("fixed", "drifting")
        if either == fixed or (fixed == "programme" and not either):
            return fixed, "fixed", classes   # some exchange as they stand: that is decided, whatever basis is tried
        return either, "drifting", joined

    def _in(self, *bases: str) -> tuple[Operation, list[set[int]] | None]:
        """What the loops do, where two that exchange in one of the bases count as the same."""
        active = [k for k in self.range if not self._idle(k)]
        if len(active) < 2:
            return "", None
        means = [self._side(_mean_name(basis)) for basis in bases]
        for members in ([0, *active] if self.start else active, active):
            classes = self._classes(bases, members)
            if classes is not None and (members is active or any(0 in c and len(c) > 1 for c in classes)):
                if len(classes) == 1:
                    return "same", classes
                if any(len(c) > 1 for c in classes):
                    return "programme", classes
                # neither answer holds where no pair exchanges both ways, yet others do most of the work, or where
                # loop 0 may do what one of them does
                return ("", None) if "above" in means or self._near(bases, active) else ("changing", classes)
        pairs = list(combinations(active, 2))
        apart = any(all(self._pair(basis, i, j, "either") == "below" for basis in bases) for i, j in pairs)
        if "above" in means and not apart:
            return "same", [set(active)]
        if all(mean == "below" for mean in means) and not self._near(bases, active):
            return "changing", None
        return "", None

    def _near(self, bases: Sequence[str], active: Sequence[int]) -> bool:
        """Is the estimate for some pair, loop 0 included, above what "different" means?"""
        return any(self._of_pair(basis, i, j)[0][0] > self._limits(basis)["below"]
                   for i, j in combinations(sorted({0, *active}), 2) for basis in bases)

    def _pair(self, basis: str, i: int, j: int, name: str = "both") -> Side:
        i, j = sorted((i, j))
        return self.claims.side(self._key(f"{basis} {i} {j} {name}", shared=True))

    def _idle(self, k: int) -> bool:
        return self.claims.side(self._key(f"work {k}", shared=True)) == "below"

    def _alike(self, bases: Sequence[str], i: int, j: int) -> Side:
        """Above: they exchange in one of the bases. Below: in none of them."""
        sides = [self._pair(basis, i, j) for basis in bases]
        if "above" in sides:
            return "above"
        return "below" if all(side == "below" for side in sides) else ""

    def _classes(self, bases: Sequence[str], members: Sequence[int]) -> list[set[int]] | None:
        """The loops by operation, if every pair is decided and "same" is transitive; else None."""
        classes: list[set[int]] = []
        for k in members:
            home = [c for c in classes if any(self._alike(bases, k, other) == "above" for other in c)]
            if len(home) > 1:
                return None
            if home:
                home[0].add(k)
            else:
                classes.append({k})
        for i, j in combinations(members, 2):
            together = any({i, j} <= c for c in classes)
            if self._alike(bases, i, j) != ("above" if together else "below"):
                return None
        return classes

    def _letters(self, classes: list[set[int]] | None) -> str:
        """A letter per loop of the whole run, A first; loop 0 gets its own where it is decided that it shares none."""
        known: dict[int, int] = {}
        for number, members in enumerate(classes or ()):
            known |= dict.fromkeys(members, number)
        if classes and 0 not in known:
            bases = [basis for basis in ("fixed", "drifting") if basis in self.drawn.tau]
            shared = [number for number, members in enumerate(classes)
                      if all(self._alike(bases, 0, k) == "above" for k in members)]
            firsts = [self._side(f"{basis} first") for basis in bases] if self.start else []
            if len(classes) == 1 and "above" in firsts:
                shared = [0]
            apart = all(self._alike(bases, 0, k) == "below" for members in classes for k in members)
            if shared:
                known[0] = shared[0]
            elif apart or (firsts and all(first == "below" for first in firsts)):
                known[0] = len(classes)
        letters: list[str] = []
        names: dict[int, str] = {}
        for k in range(self.evidence.n_loops):
            if k in self._members() and self._idle(k):
                letters.append(IDLE)
            elif k in known:
                letters.append(names.setdefault(known[k], chr(ord("A") + len(names))))
            else:
                letters.append(UNKNOWN)
        return "".join(letters)

    def _stages(self) -> Literal["re-run", "not re-run", "one layer", "undecided", "not measured"]:
        if self.evidence.layers is None or "same-layer tau" not in self.shown:
            return "not measured"
        if "other-layer tau" not in self.shown:
            return "one layer"
        same, other = self._side("same-layer tau"), self._side("other-layer tau")
        apart = self.shown["same-layer tau"][0].above(self.shown["other-layer tau"][0])
        if same == "above" and other == "below" and apart:
            return "re-run"
        return "not re-run" if same == "below" else "undecided"


def _mean_name(basis: str) -> str:
    return "tau" if basis == "fixed" else "aligned tau"


def _means(draws: Resampling, values: Float[np.ndarray, "example *rest"]) -> Float[np.ndarray, "draw *rest"]:
    """The mean over the examples that have a value, as they are and then under every draw."""
    number = np.isfinite(values).sum(0)
    estimate = np.where(number > 0, np.nansum(values, axis=0) / np.maximum(number, 1), np.nan)
    return np.concatenate([estimate[None], draws.mean(values)])
