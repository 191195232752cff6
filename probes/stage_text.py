"""A verdict of the stage test in sentences, each made from a decision and its numbers.

    report_text(findings, regime="iterating", n_seeds=1, n_examples=64, thresholds=THRESHOLDS, twin=None)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from probes.intervals import Interval
from probes.stage_rule import Finding, Regime
from probes.thresholds import Thresholds

HEADLINES: dict[Regime, str] = {
    "iterating": "The loops repeat one operation and each use of it improves the answer",
    "unrolled": "Each loop does something else: no other loop could have done its work",
    "programme": "The loops run a programme in which some operations come back and others do not",
    "settled": "The loops have settled: they add nothing to what earlier loops have found",
    "drifting": "The loops go on changing the answer, each in its own way, without improving it",
    "nothing": "There is nothing to explain: no loop improves the answer",
    "undecided": "Undecided",
}
"""What each regime says; "in a drifting basis" is added where it was found there."""


@runtime_checkable
class Told(Protocol):
    """What of a twin's verdict is quoted."""

    @property
    def regime(self) -> Regime: ...

    @property
    def findings(self) -> tuple[Finding, ...]: ...


def report_text(findings: Sequence[Finding], *, regime: Regime, n_seeds: int, n_examples: int, thresholds: Thresholds,
             twin: Told | None) -> str:
    """The sentences of a report, a paragraph per finding."""
    main = findings[0]
    basis = ", in a basis that drifts from loop to loop" if main.basis == "drifting" and regime == main.regime else ""
    lines = [f"{HEADLINES[regime]}{basis}. Sequence: {main.letters}."]
    if regime != main.regime:
        lines.append("Not every part of the report says the same.")
    several = len(findings) > 1
    for finding in findings:
        where = _loops(finding.loops) + (f", {finding.role} positions, t {finding.band}" if several else "")
        lines.append(f"{where[0].upper()}{where[1:]}: {finding.regime}. {_numbers(finding)}")
        lines.append(f"  Why: {finding.reason}.")
    if twin is not None:
        lines.append(f"The unlooped twin's pseudo-loops: {twin.regime}. {_numbers(twin.findings[0])}")
    lines.append(_scope(n_seeds, n_examples, thresholds))
    return "\n".join(lines)


def percent(found: Interval) -> str:
    return f"{found.value:.0%} [{found.low:.0%}, {found.high:.0%}]"


def _loops(loops: tuple[int, int]) -> str:
    first, stop = loops
    return f"loop {first}" if stop - first == 1 else f"loops {first} to {stop - 1}"


def _numbers(finding: Finding) -> str:
    found = {name: quantity.interval for name, quantity in finding.quantities.items()}
    sentences = []
    if "tau" in found and not finding.idle:   # of what has no work, no share can be done
        sentences.append(f"Another loop does {percent(found['tau'])} of a loop's work as it stands"
                         + (f", {percent(found['aligned tau'])} in a fitted basis" if "aligned tau" in found else ""))
    if "same-layer tau" in found and not finding.idle:
        sentence = f"the same layer of another loop does {percent(found['same-layer tau'])} of a layer's work"
        if "other-layer tau" in found:
            sentence += f", another layer {percent(found['other-layer tau'])}"
        sentences.append(f"{sentence[0].upper()}{sentence[1:]} (stages: {finding.stages})")
    sentences.append(f"Leaving a loop's work out changes the answer by {_nats(found['work'])}; a loop lowers the "
                     f"NLL by {_nats(found['gain'])} and is worth {_nats(found['worth'])} to the final answer")
    return ". ".join(sentences) + "."


def _nats(found: Interval) -> str:
    value, low, high = (f"{number:.3f}".replace("-0.000", "0.000") for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}] nat"


def _scope(n_seeds: int, n_examples: int, thresholds: Thresholds) -> str:
    if n_seeds >= thresholds.least_seeds:
        who = f"models trained in this way ({n_seeds} training seeds)"
    else:
        who = "this model" if n_seeds == 1 else f"these {n_seeds} models"
    return (f"This is a statement about {who}, from {n_examples} examples; intervals are 95%, decisions are corrected "
            f"for their number (Holm), thresholds of {thresholds.date}.")
