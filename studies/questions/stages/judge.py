"""From measurements to words: what `rerun.py` finds, and what it leaves open.

- On the **operation** nothing is decided. What was measured is told with its intervals, the
  trained model beside the spread of untrained ones. Attention of one layer is alike over loops
  wherever weights are shared, so that no ratio of distances shows a repeated operation.
- The **content** *advances* if linear probes read at least `SMALLEST_SLOPE` of the regions more
  per loop, and accuracy at S_max exceeds that at one loop by at least `SMALLEST_GAIN`, each with
  its whole interval; it *does not advance* if the whole interval of either lies below its
  smallest effect; otherwise the data do not decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from probes.intervals import Interval, NotDefined, Spread
from studies.questions.stages.operation import SUBJECTS, Operation, Setting, Value

QUESTION = "Do the loops re-run the same stages of inference, or does each loop compute something new?"

SMALLEST_SLOPE = 0.01
"""Share of all regions that probes must read more per loop: 0.07 rows of an automaton's seven."""
SMALLEST_GAIN = 0.01
"""Share of free cells by which S_max loops must be better than one."""

OPEN = ("Whether the loops repeat an operation is left open: a test of that, calibrated on models whose operation is "
        "known, is being built.")

Decision = Literal["advances", "does not advance", "undecided"]


def judge(setting: Setting, operation: Operation, content: Operation) -> dict[str, Any]:
    """The findings as plain data: words, the decision on the content, and a table with intervals per subject."""
    regions = len(setting.task.regions()[setting.batch.free.any(0)].unique())
    smallest = {"probe_slope": SMALLEST_SLOPE * regions, "accuracy_gain": SMALLEST_GAIN}
    decision = decide({key: content.value(key, "loop") for key in smallest}, smallest)
    region = setting.task.region_name
    operation_words = f"{_on_attention(operation)} {_on_freezing(operation)}"
    content_words = (
        f"The content {_DECIDED[decision]}: linear probes read {content.value('probe_slope', 'loop')} more {region}s "
        f"per loop, and accuracy rises by {content.value('accuracy_gain', 'loop')} from one loop to "
        f"{setting.models['loop'].model.config.max_loops}. What counts is at least {smallest['probe_slope']:g} "
        f"{region}s per loop ({SMALLEST_SLOPE:.0%} of {regions}) and {SMALLEST_GAIN:g} of accuracy, with the whole "
        "interval.")
    conclusion = f"{_CONCLUDED[decision]} {OPEN}"
    return {"question": QUESTION, "verdict": f"{content_words} {operation_words} {OPEN}", "conclusion": conclusion,
            "operation": {"decision": "open", "words": operation_words},
            "content": {"decision": decision, "smallest": smallest, "words": content_words},
            "subjects": {**SUBJECTS, "untrained": f"{len(setting.untrained)} untrained LoopMDMs"},
            "setting": {"task": setting.task.to_dict(), "t": setting.t, "examples": len(setting.noised),
                        "n_loops": setting.n_loops, "untrained": len(setting.untrained), "region": region},
            "table": [_row(section, row) for section, half in (("operation", operation), ("content", content))
                      for row in half.rows]}


def decide(values: Mapping[str, Value], smallest: Mapping[str, float]) -> Decision:
    """All whole intervals at or above their smallest effects, any whole interval below, or neither."""
    found = [(values[key], bound) for key, bound in smallest.items()]
    if any(isinstance(value, NotDefined) for value, _ in found):
        return "undecided"
    intervals = [(value, bound) for value, bound in found if isinstance(value, Interval)]
    if any(value.high < bound for value, bound in intervals):
        return "does not advance"
    return "advances" if all(value.low >= bound for value, bound in intervals) else "undecided"


_DECIDED = {"advances": "advances", "does not advance": "does not advance",
            "undecided": "is not decided by these data"}
_CONCLUDED = {
    "advances": "With each loop more of the answer can be read out of the state, and answers get better.",
    "does not advance": "The loops do not bring the answer forward by as much as would count.",
    "undecided": "Whether the loops bring the answer forward is not decided by these data."}


def _on_attention(operation: Operation) -> str:
    """The ratio of attention distances beside the deep twin's and the untrained models', and what it cannot tell."""
    ours, control, chance = (operation.value("ratio", subject) for subject in ("loop", "control", "untrained"))
    if isinstance(ours, NotDefined):
        return f"The ratio of attention distances, same layer ÷ different layers, is {ours}."
    told = (f"Attention of the same layer in different loops differs {ours} times as much as attention of different "
            f"layers. In the unlooped deep twin, cut into pseudo-loops, that ratio is {control}.")
    if not isinstance(chance, Spread):
        return f"{told} In the untrained LoopMDMs it is {chance}."
    n = len(chance.each)
    told += (f" In {n} untrained LoopMDMs of the same shape, which have learned nothing, it is {chance.low:.3f} to "
             f"{chance.high:.3f}, and the trained one's lies {_place(ours, chance)}.")
    if isinstance(control, Interval):
        below = sum(value < min(1, control.low) for value in chance.each)
        told += (f" {below} of the {n} lie below 1 and below the deep twin's interval"
                 + (": shared weights alone bring that about, so that the ratio cannot show a repeated operation."
                    if below else "."))
    return told


def _place(ours: Interval, untrained: Spread) -> str:
    """Where a value lies in the spread of untrained models."""
    if ours.high < untrained.low:
        return "below all of them"
    if ours.low > untrained.high:
        return "above all of them"
    lower = sum(value < ours.value for value in untrained.each)
    return f"within that spread (lower ones: {lower} of {len(untrained.each)})"


def _on_freezing(operation: Operation) -> str:
    row = next(row for row in operation.rows if row["key"] == "lost")
    loss = row["values"]
    return f"The {row['measure']} is {loss['loop']} in the LoopMDM and {loss['control']} in the deep twin."


def add_seeds(verdict: dict[str, Any], others: Mapping[str, dict[str, Any]]) -> None:
    """Put the point estimates of further training runs beside the first one's, and count the decisions."""
    every = {"": verdict, **others}
    verdict["seeds"] = {variant or "first": {
        "content": v["content"]["decision"],
        "values": {row["key"]: {subject: row[subject].get("value") for subject in SUBJECTS if subject in row}
                   for row in v["table"]}} for variant, v in every.items()}
    if others:
        advances = sum(v["content"]["decision"] == "advances" for v in every.values())
        ratios = [seed["values"]["ratio"]["loop"] for seed in verdict["seeds"].values()]
        listed = ", ".join("not defined" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        verdict["over_seeds"] = (f"Over {len(every)} training runs the content advances in {advances}; the ratio of "
                                 f"attention distances is {listed}.")
        verdict["verdict"] += " " + verdict["over_seeds"]


def _row(section: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"section": section, "key": row["key"], "measure": row["measure"], "definition": row["definition"],
            **{subject: _cell(value) for subject, value in row["values"].items()}}


def _cell(value: Value) -> dict[str, Any]:
    """A value as JSON, which has no NaN."""
    if isinstance(value, NotDefined):
        return {"undefined": value.reason}
    cell: dict[str, Any] = {"value": value.value, "low": value.low, "high": value.high}
    return {**cell, "each": list(value.each)} if isinstance(value, Spread) else cell


def cell_text(cell: Mapping[str, Any] | None, *, digits: int = 3) -> str:
    """A cell of the table for people: value and interval, "not defined", or nothing where it was not measured."""
    if cell is None:
        return ""
    if "undefined" in cell:
        return "not defined"
    return f"{cell['value']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"


def notes(verdict: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know: what brackets hold, and why a value is not defined."""
    subjects = verdict["subjects"]
    told = [f"Brackets hold 95% bootstrap intervals over {verdict['setting']['examples']} held-out examples of one "
            "training run, which say nothing about another run; for the untrained models, of which the mean is given, "
            "the least and greatest value."]
    for row in verdict["table"]:
        missing = {subject: row[subject]["undefined"] for subject in subjects if "undefined" in row.get(subject, {})}
        for reason in dict.fromkeys(missing.values()):
            named = ", ".join(subjects[subject] for subject, why in missing.items() if why == reason)
            told.append(f"{row['measure'][:1].upper()}{row['measure'][1:]} ({named}): not defined because {reason}.")
    return told


def summary_text(verdict: dict[str, Any]) -> str:
    """The table and the findings, for a terminal."""
    subjects = list(verdict["subjects"])
    rows = [["measure", *verdict["subjects"].values()]]
    rows += [[row["measure"], *(cell_text(row.get(s)) for s in subjects)] for row in verdict["table"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join([verdict["question"], "", *lines, "", *notes(verdict), "", verdict["verdict"]])
