"""The stage test: do the loops re-run the same stages of inference, or does each loop compute something new?

One call on any model of the contract. It measures whether loops can do each other's work (τ, `probes.exchange`; in a
drifting basis, `probes.alignment`), whether single layers can, and what each loop adds to the answer
(`probes.gains`); then it decides by a rule whose numbers stand in `probes.thresholds`, and abstains where the
evidence does not reach.

    verdict = stage_test(model, noised, targets=clean, n_loops=4)
    verdict.regime, verdict.letters                           # "iterating", "ABBB"
    print(verdict.text)

**The rule**, per role of the positions, band of t and range of loops, loop 0 apart; δ is `Thresholds.effect`.

1. *Work.* A loop is idle if leaving its content out changes the answer by less than δ. If every loop of the range is
   idle, or neither the loops after the first nor the range add to the answer: **settled** where earlier loops added to
   it, **nothing** where none did.
2. *Operation.* Two loops have the same letter if τ lies above .5 in both directions. *Same*: one letter, or the mean τ
   of the range, weighted by work, lies above .5 and no two loops lie below .25 both ways. *Changing*: no two loops
   share a letter, or the mean lies below .25 and no pair is the same. If τ does not say same, aligned τ is asked the
   same questions, with .8 and .5 in the place of .5 and .25 and the mean of both directions, since a basis is fitted to
   make loops agree: *same in a drifting basis* if it does; *changing* needs both to say so, while a programme that τ
   shows stands where aligned τ decides nothing. Loop 0 joins in where it shares a letter with another.
3. *Content.* It *advances* if the range lowers the NLL by more than δ per loop, or the loops' work is worth more than
   δ each to the final answer, and a straight line does not do as well; *nothing new* if both are within δ of 0.
4. *Regime.* same + advances: **iterating**; changing + advances: **unrolled**; some letters repeat + advances:
   **programme**; same + nothing new: **settled**; changing + nothing new: **drifting**; else **undecided**.

Each step needs its bootstrap p-value to hold after Holm's correction over all of the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel, Unavailable
from probes.alignment import align
from probes.cycles import Cycle, own_loops, pseudo_loops
from probes.exchange import Trajectory, checked_roles, exchange, group_of, tau
from probes.gains import check_targets, gains
from probes.stage_rule import Evidence, Exchanges, Finding, Layers, Regime, judge
from probes.stage_text import report_text
from probes.thresholds import THRESHOLDS, Thresholds

if TYPE_CHECKING:
    import pandas as pd

Roles = Int[Tensor, "batch pos"] | Mapping[str, Bool[Tensor, "batch pos"]]

BANDS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
"""Bands of t, each without its lower end, in which examples of several noise levels are judged apart."""

FEW_LEVELS = 4
"""So many noise levels, or fewer, are judged one by one."""

LAYER_LOOPS, LAYER_PLACES = 4, 12
"""Loops of a range whose single layers are exchanged, at most, and layers of all of them together (but two loops at
least); evenly spread."""

FIT_POSITIONS = 2048
"""Positions that fit the maps of a drifting basis: at least half of the examples, at most three in four. The others
judge."""

LAYER_EXAMPLES = 32
"""Examples on which single layers are exchanged, at most."""


@dataclass(frozen=True)
class Verdict:
    """What the stage test says of a model. ``str(verdict)`` is ``verdict.text``."""

    regime: Regime
    basis: Literal["fixed", "drifting"]
    letters: str                       # a letter per loop, loop 0 first; "·" without work, "?" not decided
    tau: xr.DataArray                  # τ of whole loops [content, operation]
    aligned: xr.DataArray | None       # the same in a drifting basis; None where it was not needed
    stages: xr.DataArray               # τ of single layers [content, operation], with loop and layer of each
    gains: xr.Dataset                  # calibrated NLL per number of loops, with its nulls, means over positions
    findings: tuple[Finding, ...]      # one per role, band of t and range of loops; the first is the main one
    text: str
    thresholds: Thresholds
    n_seeds: int
    n_examples: int
    twin: Verdict | None = None        # of the unlooped twin's pseudo-loops

    def __str__(self) -> str:
        return self.text

    @property
    def table(self) -> pd.DataFrame:
        """A row per role, band of t and range of loops. Needs pandas (the extra ``studies``)."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("a verdict's table is a pandas DataFrame: pip install 'loopscope[studies]', or take "
                              "verdict.rows().") from error
        return pd.DataFrame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain rows: each quantity with interval, adjusted p-value and decision."""
        return [_row(finding) for finding in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays over examples, for JSON; None where a number is not defined."""
        return {"regime": self.regime, "basis": self.basis, "letters": self.letters, "text": self.text,
                "tau": _numbers(self.tau), "aligned": None if self.aligned is None else _numbers(self.aligned),
                "stages": {"tau": _numbers(self.stages), "loop": self.stages.loop.values.tolist(),
                           "layer": self.stages.layer.values.tolist()},
                "gains": {name: _numbers(array.mean("example")) for name, array in self.gains.items()},
                "table": [{name: _known(value) for name, value in row.items()} for row in self.rows()],
                "thresholds": asdict(self.thresholds), "n_seeds": self.n_seeds,
                "n_examples": self.n_examples, "twin": None if self.twin is None else self.twin.to_dict()}


def stage_test(model: LoopedModel | Sequence[LoopedModel], inputs: Inputs, *, targets: Int[Tensor, "batch answer"],
               n_loops: int | None = None, scored: Bool[Tensor, "batch answer"] | None = None,
               twin: LoopedModel | Sequence[LoopedModel] | None = None, roles: Roles | None = None,
               t: Levels = None, loop_ranges: Sequence[tuple[int, int]] | None = None,
               layers_per_loop: int | None = None, thresholds: Thresholds = THRESHOLDS, seed: int = 0) -> Verdict:
    """Do the loops of ``model`` re-run the same stages of inference?

    ``model`` meets `hooks.contract` (`hooks.adopt` makes any looped module do so); several models are training seeds
    of one, and the intervals then tell seeds and examples apart. ``inputs`` are what it takes; ``targets`` [batch,
    answer] are the classes that its readout should answer, negative where there is none. ``n_loops``, from 2 up,
    defaults to the model's own number.

    ``scored``: positions whose answers count, by default those that the model scores and that have a target.
    ``roles``: positions whose clocks are kept apart and whose answers are judged apart: numbers [batch, pos], or
    {name: mask}; by default scored and not scored. ``t``: the noise level in (0, 1] of all examples or of each; up to
    `FEW_LEVELS` levels are judged one by one (the level of the first example is the main one), more of them in `BANDS`.
    ``loop_ranges``: [(first loop, loop after the
    last)]; by default loops 1 to the last (all, where there are two), and loops beyond the model's own number apart.
    ``twin``: an unlooped model for the same inputs, whose mid layers are cut into pseudo-loops and judged by the same
    rule. ``layers_per_loop`` does that to ``model`` itself. ``seed``: of the resampling.

    Raises ValueError, before anything is computed, for arguments that do not fit.
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    if not models:
        raise ValueError("there is no model to test.")
    cycles = [_cycle(one, n_loops, layers_per_loop) for one in models]
    if len({(cycle.n_loops, cycle.n_layers) for cycle in cycles}) > 1:
        raise ValueError("training seeds must have the same number of loops and of looped layers; test models of "
                         "other shapes one by one.")
    n = models[0].batch_size(inputs)
    if n < 2:
        raise ValueError(f"the stage test needs at least two examples, and {thresholds.least_examples} to decide "
                         f"anything; there is {n}.")
    counted = _scored(models[0], inputs, targets, scored)
    own = models[0].max_loops if layers_per_loop is None else cycles[0].n_loops
    ranges = _ranges(loop_ranges, cycles[0].n_loops, own)
    cells = [_Cell(role, band, rows, where, numbers) for band, rows in _bands(_levels(t, n), n, thresholds)
             for role, where, numbers in _roles(roles, counted, rows)]
    measured = [[_Measured.of(one, cycle, ranges, cell, inputs=inputs, targets=targets, t=t)
                 for one, cycle in zip(models, cycles, strict=True)] for cell in cells]
    report = []
    for cell, found in zip(cells, measured, strict=True):
        evidence = _pooled(cell, ranges, found)
        if any(_asks_for_another_basis(finding) for finding in judge([evidence], thresholds=thresholds, seed=seed)):
            for one in found:
                one.align(cell, ranges[0], seed=seed)
            evidence = _pooled(cell, ranges, found)
        report.append(evidence)
    findings = judge(report, thresholds=thresholds, seed=seed)
    other = None if twin is None else stage_test(
        twin, inputs, targets=targets, scored=scored, roles=roles, t=t, layers_per_loop=cycles[0].n_layers,
        thresholds=thresholds, seed=seed)
    regime = _regime(findings)
    first = measured[0]
    return Verdict(
        regime=regime, basis=findings[0].basis, letters=findings[0].letters, tau=_mean_tau(first, "loops"),
        aligned=_mean_tau(first, "aligned") if report[0].aligned is not None else None,
        stages=_mean_tau(first, "layers"), gains=_mean_gains(first), findings=tuple(findings),
        text=report_text(findings, regime=regime, n_seeds=len(models), n_examples=n, thresholds=thresholds, twin=other),
        thresholds=thresholds, n_seeds=len(models), n_examples=n, twin=other)


# ------------------------------------------------------------------------- measuring

@dataclass(frozen=True)
class _Cell:
    """Which examples and positions a finding is about."""

    role: str
    band: str
    rows: Int[Tensor, "row"]
    scored: Bool[Tensor, "row answer"]
    roles: Int[Tensor, "row pos"] | None


@dataclass
class _Measured:
    """What was measured of one model in one cell."""

    run: Trajectory
    cycle: Cycle
    wanted: Bool[np.ndarray, "content operation"]
    loops: xr.Dataset
    layers: xr.Dataset
    gains: xr.Dataset
    aligned: xr.Dataset | None = None

    @classmethod
    def of(cls, model: LoopedModel, cycle: Cycle, ranges: Sequence[tuple[int, int]], cell: _Cell, *, inputs: Inputs,
           targets: Tensor, t: Levels) -> _Measured:
        inputs, level = model.select(inputs, cell.rows), _level(t, cell.rows)
        run = Trajectory.of(model, inputs, cycle, t=level)
        options: dict[str, Any] = {"scored": cell.scored, "roles": cell.roles, "t": level}
        wanted = _pairs_within(ranges, cycle.n_loops)
        loops = exchange(model, inputs, cycle, trajectory=run, pairs=wanted, **options)
        found = gains(model, inputs, cycle, targets=targets[cell.rows], trajectory=run, **options)
        if cycle.n_layers == 1:
            layers = loops
        else:
            few = _spread(len(cell.rows), LAYER_EXAMPLES)
            most = min(LAYER_LOOPS, max(2, LAYER_PLACES // cycle.n_layers))
            chosen = [ranges[0][0] + i for i in _spread(ranges[0][1] - ranges[0][0], most).tolist()]
            labels = cycle.labels("layer")
            pairs = np.array([[k in chosen and other in chosen and k != other for other, _ in labels]
                              for k, _ in labels])
            layers = exchange(model, model.select(inputs, few), cycle, maps="layer", pairs=pairs,
                              scored=cell.scored[few], roles=None if cell.roles is None else cell.roles[few],
                              t=_level(level, few))
        return cls(run, cycle, wanted, loops, layers, found)

    def align(self, cell: _Cell, loops: tuple[int, int], *, seed: int) -> None:
        """Measure again in a fitted basis, on the examples that did not fit it."""
        judged = _judging(self.run)
        frame = align(self.run, fit=torch.nonzero(~judged)[:, 0], places=sorted({0, *range(*loops)}),
                      groups=group_of(checked_roles(cell.roles, cell.scored, self.run), "role"), seed=seed)
        found = exchange(self.run.model, None, self.cycle, trajectory=self.run, pairs=self.wanted, frame=frame,
                         scored=cell.scored)
        self.aligned = found.where(xr.DataArray(judged.numpy(), dims="example"))


def _judging(run: Trajectory) -> Bool[Tensor, "example"]:
    """The examples, evenly spread, that judge the maps of a drifting basis."""
    n, needed = run.n_examples, -(-FIT_POSITIONS // run.states[0].shape[1])
    n_judged = min(n // 2, max(n // 4, n - needed, 1))
    judged = torch.zeros(n, dtype=torch.bool)
    judged[(torch.arange(n_judged) * n) // n_judged + n // n_judged - 1] = True
    return judged


def _pooled(cell: _Cell, ranges: tuple[tuple[int, int], ...], found: Sequence[_Measured]) -> Evidence:
    """The evidence of all training seeds, their examples one after another."""
    def joined(name: str) -> Exchanges:
        parts = [getattr(one, name) for one in found]
        return Exchanges(np.concatenate([part.kl.values for part in parts], -1),
                         np.concatenate([part.work.values for part in parts], -1))

    def curve(name: str) -> np.ndarray:
        return np.concatenate([_over_positions(one.gains[name]) for one in found], -1)

    labels = found[0].layers
    return Evidence(
        role=cell.role, band=cell.band, sizes=tuple(one.run.n_examples for one in found), ranges=ranges,
        loops=joined("loops"), prefix=curve("prefix"), skip=curve("skip"), line=curve("line"),
        aligned=joined("aligned") if all(one.aligned is not None for one in found) else None,
        layers=Layers(joined("layers"), tuple(labels.loop.values.tolist()), tuple(labels.layer.values.tolist()),
                      tuple(one.layers.sizes["example"] for one in found)))


def _asks_for_another_basis(finding: Finding) -> bool:
    """Would it matter if the loops did the same in a basis that drifts? Not where there is no work to be exchanged."""
    return finding.enough and finding.operation != "same" and finding.quantities["work"].side == "above"


def _over_positions(values: xr.DataArray) -> np.ndarray:
    """Means over an example's scored positions; NaN where there are none."""
    known = values.notnull()
    number = known.sum("pos")
    return (values.fillna(0).sum("pos") / number.where(number > 0)).values


def _mean_tau(found: Sequence[_Measured], name: str) -> xr.DataArray:
    """τ from means over the examples of all training seeds; layers that were not exchanged are left out."""
    together = xr.concat([getattr(one, name) for one in found], "example", coords="minimal", compat="override")
    exchanged = np.isfinite(together.kl.values).any(-1)
    return tau(together).isel(content=exchanged.any(1), operation=exchanged.any(0))


def _mean_gains(found: Sequence[_Measured]) -> xr.Dataset:
    together = xr.concat([one.gains for one in found], "example", coords="minimal", compat="override")
    return xr.Dataset({name: (array.dims[:-1], _over_positions(array), array.attrs)
                       for name, array in together.items()}, coords={"loops": together.loops})


# ------------------------------------------------------------------------- arguments

def _cycle(model: LoopedModel, n_loops: int | None, layers_per_loop: int | None) -> Cycle:
    if layers_per_loop is not None:
        found = pseudo_loops(model.topology(1), layers_per_loop)
        if n_loops is None or n_loops == found.n_loops:
            return found
        if not 2 <= n_loops < found.n_loops:
            raise ValueError(f"{model.name} has {found.n_loops} pseudo-loops of {layers_per_loop} layers: n_loops is "
                             f"between 2 and that, not {n_loops}.")
        return Cycle(found.topology, found.depths[:n_loops])
    n_loops = model.max_loops if n_loops is None else n_loops
    if n_loops < 2:
        raise ValueError(f"the stage test compares loops, and n_loops is {n_loops}: give at least 2; an unlooped model "
                         "is cut into pseudo-loops by layers_per_loop=….")
    return own_loops(model.topology(n_loops))


def _scored(model: LoopedModel, inputs: Inputs, targets: Tensor, scored: Tensor | None) -> Bool[Tensor, "batch answer"]:
    """Positions whose answers count: as given, or the model's own rule where it fits the targets."""
    if scored is not None:
        if scored.shape != targets.shape:
            raise ValueError(f"scored has shape {tuple(scored.shape)}, targets {tuple(targets.shape)}.")
        counted = scored.bool()
    else:
        try:
            own = model.scored(inputs)
        except Unavailable:
            own = None
        counted = targets >= 0
        if own is not None and own.shape == targets.shape:
            counted = counted & own.to(counted.device)
    if not bool(counted.any()):
        raise ValueError("no position is scored: mask some of the inputs, or give scored=… and targets that are not "
                         "negative there.")
    check_targets(targets, counted)
    return counted


def _levels(t: Levels, n: int) -> Float[Tensor, "batch"] | None:
    """The noise level of each example. ValueError for what is no level."""
    if t is None:
        return None
    level = torch.as_tensor(t, dtype=torch.float32)
    if level.ndim > 1 or (level.ndim == 1 and len(level) != n):
        raise ValueError(f"t is one noise level or one for each of the {n} examples, not of shape "
                         f"{tuple(level.shape)}.")
    if not bool(((level > 0) & (level <= 1)).all()):
        raise ValueError(f"a noise level t lies in (0, 1]; t holds {float(level.min())} to {float(level.max())}.")
    return level.expand(n)


def _level(t: Levels, rows: Int[Tensor, "row"]) -> Levels:
    return t[rows] if isinstance(t, Tensor) and t.ndim else t


def _bands(levels: Float[Tensor, "batch"] | None, n: int, thresholds: Thresholds) -> list[tuple[str, Tensor]]:
    """(name, its examples) of each level or band of t; bands with too few examples are left out."""
    if levels is None:
        return [("any", torch.arange(n))]
    each = list(dict.fromkeys(levels.tolist()))
    if len(each) <= FEW_LEVELS:
        return [(f"{level:g}", torch.nonzero(levels == level)[:, 0]) for level in each]
    found = [(f"{low:.2g} to {high:.2g}", torch.nonzero((levels > low) & (levels <= high))[:, 0])
             for low, high in BANDS]
    kept = [(name, rows) for name, rows in found if len(rows) >= thresholds.least_examples]
    if not kept:
        raise ValueError(f"no band of t has {thresholds.least_examples} examples: give more, or one level.")
    return kept


def _roles(roles: Roles | None, scored: Bool[Tensor, "batch answer"], rows: Int[Tensor, "row"],
           ) -> list[tuple[str, Bool[Tensor, "row answer"], Int[Tensor, "row pos"] | None]]:
    """(name, scored positions of that role, the role of every position) of each role with an answer."""
    if roles is None:
        return [("scored", scored[rows], None)]
    if isinstance(roles, Mapping):
        names = list(roles)
        masks = torch.stack([mask.bool() for mask in roles.values()])
        if bool((masks.sum(0) > 1).any()):
            raise ValueError(f"roles {names} overlap: a position has one role.")
        numbers = torch.where(masks.any(0), masks.long().argmax(0), len(names))
        names.append("other")
    else:
        numbers = roles.long()
        names = [str(number) for number in range(int(numbers.max()) + 1)]
    if numbers.shape != scored.shape:
        return [("scored", scored[rows], numbers[rows])]
    split = [(name, scored & (numbers == i)) for i, name in enumerate(names)]
    return [(name, where[rows], numbers[rows]) for name, where in split if bool(where[rows].any())]


def _ranges(given: Sequence[tuple[int, int]] | None, n_loops: int, own: int) -> tuple[tuple[int, int], ...]:
    """Ranges of loops that are judged: loop 0 apart where at least two others remain."""
    if given is None:
        first = 1 if n_loops > 2 else 0
        stop = n_loops if n_loops <= own or own < first + 2 else own
        return ((first, stop),) if stop == n_loops else ((first, stop), (stop, n_loops))
    for start, stop in given:
        if not 0 <= start < stop <= n_loops:
            raise ValueError(f"loops {start} up to {stop} are no range of 0..{n_loops}.")
    if not given:
        raise ValueError("loop_ranges is empty: leave it out for the default.")
    return tuple((start, stop) for start, stop in given)


def _pairs_within(ranges: Sequence[tuple[int, int]], n_loops: int) -> Bool[np.ndarray, "content operation"]:
    """Pairs of loops of one range, each with loop 0."""
    wanted = np.eye(n_loops, dtype=bool)
    for loops in ranges:
        members = [0, *range(*loops)]
        wanted[np.ix_(members, members)] = True
    return wanted


def _spread(n: int, most: int) -> Int[Tensor, "chosen"]:
    """At most ``most`` of n numbers from 0, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def _regime(findings: Sequence[Finding]) -> Regime:
    """That of the main range of loops, if every role and band that says something says the same."""
    said = [finding.regime for finding in findings if finding.loops == findings[0].loops]
    something = {regime for regime in said if regime not in ("nothing", "undecided")}
    if len(something) == 1:
        return something.pop()
    return said[0] if len(set(said)) == 1 else "undecided"


def _numbers(values: xr.DataArray) -> Any:
    """Nested lists (or one number) for JSON, with None for what was not measured."""
    found = np.array(values.values, dtype=object)
    found[~np.isfinite(values.values)] = None
    return found.tolist()


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _row(finding: Finding) -> dict[str, Any]:
    row: dict[str, Any] = {"role": finding.role, "t": finding.band, "first_loop": finding.loops[0],
                           "last_loop": finding.loops[1] - 1, "regime": finding.regime, "basis": finding.basis,
                           "letters": finding.letters, "stages": finding.stages, "reason": finding.reason}
    for name, found in finding.quantities.items():
        key = COLUMNS[name]
        row |= {key: found.interval.value, f"{key}_low": found.interval.low, f"{key}_high": found.interval.high,
                f"{key}_p": found.p, f"{key}_decision": found.side or "undecided"}
    return row


COLUMNS = {"tau": "tau", "aligned tau": "aligned_tau", "same-layer tau": "same_layer_tau",
           "other-layer tau": "other_layer_tau", "work": "work", "gain": "gain", "worth": "worth",
           "whole gain": "whole_gain", "earlier gain": "earlier_gain", "earlier worth": "earlier_worth",
           "beyond the line": "beyond_the_line"}
"""Columns of the table by quantity of the rule."""
