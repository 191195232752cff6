"""From measurements to words: what `rerun.py` concludes, by rules fixed in advance.

- The **operation** repeats if the ratio of attention distances (same layer across loops ÷
  different layers) lies, with its whole interval, below 1 and below the control's interval.
  The plain variance partition is reported but decides nothing.
- The **content** advances if the number of regions that linear probes read grows per loop,
  its whole interval above 0, and accuracy at S_max exceeds that at one loop likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probes.intervals import Interval
from studies.rerun_operation import SUBJECTS, Operation, Setting

QUESTION = "Do the loops re-run the same stages of inference, or does each loop compute something new?"


def judge(setting: Setting, operation: Operation, content: Operation) -> dict[str, Any]:
    """The verdict as plain data: words, decisions, and a table with intervals for each subject."""
    ours, control = operation.value("ratio", "loop"), operation.value("ratio", "control")
    chance = operation.value("ratio", "untrained")
    repeats = ours.below(1) and ours.below(control)
    slope, gain = content.value("probe_slope", "loop"), content.value("accuracy_gain", "loop")
    advances = slope.low > 0 and gain.low > 0
    region = setting.task.region_name
    operation_words = (
        f"The operation {'repeats' if repeats else 'is not shown to repeat'}: attention of the same layer in different "
        f"loops differs {ours} times as much as attention of different layers, against {control} in the unlooped "
        f"deep twin cut into pseudo-loops. " + _on_sharing(ours, chance) + _on_freezing(operation))
    content_words = (
        f"The content {'advances' if advances else 'is not shown to advance'}: linear probes read {slope} more "
        f"{region}s per loop, and accuracy rises by {gain} from one loop to "
        f"{setting.models['loop'].model.config.max_loops}.")
    return {"question": QUESTION, "verdict": f"{operation_words} {content_words} {_together(repeats, advances)}",
            "conclusion": _together(repeats, advances),
            "operation": {"repeats": repeats, "words": operation_words},
            "content": {"advances": advances, "words": content_words},
            "subjects": SUBJECTS,
            "setting": {"task": setting.task.to_dict(), "t": setting.t, "examples": len(setting.noised),
                        "n_loops": setting.n_loops, "region": region},
            "table": [_row(section, row) for section, half in (("operation", operation), ("content", content))
                      for row in half.rows]}


def add_seeds(verdict: dict[str, Any], others: Mapping[str, dict[str, Any]]) -> None:
    """Put the point estimates of further seeds beside the first one's, and say whether they agree."""
    every = {"": verdict, **others}
    verdict["seeds"] = {variant or "first": {
        "repeats": v["operation"]["repeats"], "advances": v["content"]["advances"],
        "values": {row["key"]: {subject: row[subject]["value"] for subject in SUBJECTS if subject in row}
                   for row in v["table"]}} for variant, v in every.items()}
    if others:
        repeats = sum(v["operation"]["repeats"] for v in every.values())
        advances = sum(v["content"]["advances"] for v in every.values())
        words = (f"Over {len(every)} training seeds the operation repeats in {repeats} and the content advances in "
                 f"{advances}.")
        verdict["over_seeds"] = words
        verdict["verdict"] += " " + words


def _together(repeats: bool, advances: bool) -> str:
    if repeats and advances:
        return ("So each loop applies the same operation to new content: it re-runs its stages, and gets further by "
                "doing so.")
    if repeats:
        return "So the loops re-run their stages without getting further."
    if advances:
        return "So the loops get further, and not by an operation that this test sees repeated."
    return "So this test shows neither a repeated operation nor advancing content."


def _on_sharing(ours: Interval, untrained: Interval) -> str:
    """How much of the repetition the shared weights bring by themselves."""
    if untrained.below(ours):
        how = "training has made its loops differ more than shared weights alone would"
    elif ours.below(untrained):
        how = "training has made its loops more alike than shared weights alone do"
    else:
        how = "no different from what shared weights alone bring"
    return f"An untrained LoopMDM has {untrained}: {how}. "


def _on_freezing(operation: Operation) -> str:
    loss = {subject: operation.value("unfrozen", subject).value - operation.value("frozen", subject).value
            for subject in ("loop", "control")}
    return (f"Freezing attention after the second loop costs {loss['loop']:.2f} of accuracy in the LoopMDM and "
            f"{loss['control']:.2f} in the control.")


def _row(section: str, row: dict[str, Any]) -> dict[str, Any]:
    values = {subject: {"value": v.value, "low": v.low, "high": v.high} for subject, v in row["values"].items()}
    return {"section": section, "key": row["key"], "measure": row["measure"], "definition": row["definition"],
            "expected": row["expected"], "agrees": _agrees(row["expected"], row["values"]), **values}


def _agrees(expected: str, values: dict[str, Interval]) -> bool | None:
    """Did it come out as expected, with intervals apart? None where nothing was expected or measured."""
    loop, control = values.get("loop"), values.get("control")
    if loop is None:
        return None
    if expected == "above 0":
        return loop.low > 0
    if control is None:
        return None
    if expected.startswith("LoopMDM below 1"):
        return loop.below(1) and loop.below(control)
    if expected == "LoopMDM lower":
        return loop.below(control)
    if expected in ("LoopMDM higher", "LoopMDM above its control", "LoopMDM loses less"):
        return control.below(loop)
    return None


def summary_text(verdict: dict[str, Any]) -> str:
    """The short table and the verdict, for a terminal."""
    subjects = list(verdict["subjects"])
    head = ["measure", *(verdict["subjects"][s] for s in subjects), "expected", "seen"]
    rows = [head]
    for row in verdict["table"]:
        cells = [str(Interval(**row[s])) if s in row else "" for s in subjects]
        seen = {True: "yes", False: "no", None: ""}[row["agrees"]]
        rows.append([row["measure"], *cells, row["expected"], seen])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join([verdict["question"], "", *lines, "", verdict["verdict"]])
