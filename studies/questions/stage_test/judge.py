"""From verdicts of single subjects to the answer in words: every sentence is made from a decision and its numbers.

    verdict = judge(found, calibration=None)
    verdict["answer"], verdict["words"], verdict["open"]

``found`` is what `measure` gives: a verdict as plain data for each subject.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.thresholds import THRESHOLDS

QUESTION = "Do the loops re-run the same stages of inference, or does each loop compute something new?"

STATED = ("iterating", "unrolled", "programme", "settled", "drifting")
"""Regimes that say something about the loops."""
MAIN = "automaton"
"""The group that the answer is told of, where it was tested; the first looped one otherwise."""
KINDS = {"control": "control", "loop": "LoopMDM", "deep": "unlooped deep twin", "foreign": "pretrained, looped by us",
         "untrained": "untrained"}

SHARES = ("tau", "aligned_tau", "same_layer_tau", "other_layer_tau")

Found = Mapping[str, Mapping[str, Any]]


def judge(found: Found, *, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """The findings as plain data: the answer, its sentences, what is open, and a row per subject and cell."""
    rows = sorted(map(subject_row, found.values()), key=lambda row: list(KINDS.values()).index(row["kind"]))
    main = main_group(found)
    sentences = [*_on_main(found, main), _on_groups(found, "loop", "trained LoopMDMs"),
                 _on_groups(found, "deep", "unlooped deep twins"), *_on_foreign(found), *_on_untrained(found),
                 *_on_far(found), *_on_calibration(calibration)]
    return {"question": QUESTION, "answer": _answer(found, main), "words": [s for s in sentences if s],
            "open": _open(found), "main": main, "subjects": rows,
            "table": [{"subject": told["name"], "kind": told["kind"], **row}
                      for told in found.values() for part in _parts(told) for row in part["table"]],
            "thresholds": next(iter(found.values()))["verdict"]["thresholds"],
            "calibration": None if calibration is None else calibration["found"]["totals"]["kept"]}


def subject_row(told: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of subjects: the main noise level and range of loops, and the regime at other levels."""
    verdict, cell = told["verdict"], main_cell(told)
    row = {"subject": told["name"], "kind": KINDS[told["kind"]], "about": told["about"], "seeds": len(told["seeds"]),
           "t": cell["t"], "loops": len(cell["letters"]), "regime": cell["regime"], "letters": cell["letters"],
           "basis": cell["basis"], "stages": cell["stages"],
           "elsewhere": {other["t"]: other["regime"] for other in verdict["table"][1:]}}
    idle = cell["work_decision"] == "below"   # of what has no work, no share can be done
    for name in (*SHARES, "work", "gain"):
        known = name in cell and cell[name] is not None and not (idle and name in SHARES)
        row[name] = {end: cell[f"{name}{end and '_' + end}"] for end in ("", "low", "high")} if known else None
    return row


def main_cell(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of a verdict at the first noise level, for the main range of loops."""
    cell: Mapping[str, Any] = told["verdict"]["table"][0]
    return cell


def main_group(found: Found) -> str:
    """The group that the answer is told of."""
    looped = [told["name"] for told in found.values() if told["kind"] == "loop"]
    return MAIN if MAIN in looped or not looped else looped[0]


def cell_text(row: Mapping[str, Any], name: str) -> str:
    """A share with its interval, of a row of the subjects' table; "–" where it was not measured."""
    value = row[name]
    if value is None:
        return "–"
    within = "too few examples" if value["low"] is None else f"{value['low']:.0%}, {value['high']:.0%}"
    return f"{value['']:.0%} [{within}]"


def _answer(found: Found, main: str) -> str:
    """The whole in one sentence, which follows from the regimes of the main group and of its deep twin."""
    if f"{main}-loop" not in found:
        return "No looped model of the zoo was tested."
    regime, stages = (main_cell(found[f"{main}-loop"])[key] for key in ("regime", "stages"))
    told = {"iterating": f"On {main} the loops re-run the same operation, and each use of it improves the answer",
            "unrolled": f"On {main} each loop computes something new",
            "programme": f"On {main} the loops run a programme in which some operations come back",
            "settled": f"On {main} the loops have settled and add nothing",
            "drifting": f"On {main} the loops go on changing the answer without improving it",
            "nothing": f"On {main} no loop improves the answer",
            "undecided": f"On {main} the test does not decide what the loops do"}[regime]
    if regime == "iterating" and stages == "re-run":
        told += ", layer by layer"
    if (deep := found.get(f"{main}-deep")) is not None:
        told += f"; the unlooped deep twin is {_called(main_cell(deep)['regime'])}"
        if (row := subject_row(deep))["tau"] is not None:
            told += f" (another pseudo-loop does {cell_text(row, 'tau')} of a pseudo-loop's work)"
    return told + "."


def _called(regime: str) -> str:
    return {"unrolled": "unrolled: each of its pseudo-loops computes something else", "undecided": "left undecided",
            "nothing": "found to gain nothing by its pseudo-loops"}.get(regime, f"called {regime}")


def _on_main(found: Found, main: str) -> list[str]:
    sentences = []
    for kind, who in (("loop", "LoopMDM"), ("deep", "unlooped deep twin, cut into pseudo-loops")):
        if (told := found.get(f"{main}-{kind}")) is None:
            continue
        row, cell = subject_row(told), main_cell(told)
        said = f"In the {who} ({main}, {_seeds(row['seeds'])}, t = {row['t']}) "
        said += ("no loop of the range changes the answer" if row["tau"] is None else
                 f"another loop does {cell_text(row, 'tau')} of a loop's work as it stands")
        if row["aligned_tau"] is not None:
            said += f", {cell_text(row, 'aligned_tau')} in a fitted basis"
        if row["same_layer_tau"] is not None and row["other_layer_tau"] is not None:
            said += (f"; of a layer's work the same layer of another loop does {cell_text(row, 'same_layer_tau')}, "
                     f"another layer {cell_text(row, 'other_layer_tau')} (stages: {cell['stages']})")
        others = "".join(f"; at t = {t} {regime}" for t, regime in row["elsewhere"].items())
        sentences.append(f"{said}: {cell['regime']}, {cell['letters']}{others}.")
    return sentences


def _seeds(n: int) -> str:
    return f"{n} training seeds" if n != 1 else "one training seed"


def _on_groups(found: Found, kind: str, who: str) -> str:
    """How many groups of a kind are called what, and which."""
    of = [told for told in found.values() if told["kind"] == kind]
    if not of:
        return ""
    by: dict[str, list[str]] = {}
    for told in of:
        cell = main_cell(told)
        drifting = " in a drifting basis" if cell["basis"] == "drifting" and cell["regime"] in STATED else ""
        by.setdefault(f"{cell['regime']}{drifting}", []).append(told["name"])
    listed = "; ".join(f"{regime} {len(names)} ({_listed(names)})"
                       for regime, names in sorted(by.items(), key=lambda item: -len(item[1])))
    models = sum(len(told["seeds"]) for told in of)
    return f"Of {len(of)} groups of {who} ({models} models), at the first noise level: {listed}."


def _listed(names: Sequence[str]) -> str:
    """Names of groups; ablations are counted."""
    told = [name for name in names if ABLATION not in name]
    if n := len(names) - len(told):
        told.append(f"{n} ablation{'s' * (n != 1)} of {next(name for name in names if ABLATION in name).split('-')[0]}")
    return ", ".join(told)


ABLATION = "-ablation-"


def _on_foreign(found: Found) -> list[str]:
    return [f"{told['name']}, {told['about']}: {main_cell(told)['regime']}, {main_cell(told)['letters']}."
            for told in found.values() if told["kind"] == "foreign"]


def _on_untrained(found: Found) -> list[str]:
    of = [told for told in found.values() if told["kind"] == "untrained"]
    if not of:
        return []
    wrong = [told["name"] for told in of if any(row["regime"] in STATED for row in told["verdict"]["table"])]
    named = f" ({', '.join(wrong)})" if wrong else ""
    return [f"Of {len(of)} untrained models {len(wrong)} are called anything but nothing or undecided{named}."]


def _on_far(found: Found) -> list[str]:
    of = [(told["name"], told["far"]) for told in found.values() if "far" in told]
    if not of:
        return []
    settled = [name for name, far in of if far["regime"] == "settled"]
    rest = [f"{name} {far['regime']}" for name, far in of if far["regime"] != "settled"]
    return [f"From twice S_max loops on, {len(settled)} of {len(of)} groups are settled"
            + (f"; not: {', '.join(rest)}" if rest else "") + "."]


def _on_calibration(calibration: Mapping[str, Any] | None) -> list[str]:
    if calibration is None:
        return []
    kept = calibration["found"]["totals"]["kept"]
    return [f"On {kept['n']} controls of known truth that had no part in making the rule, the test was right on "
            f"{kept['right']}, wrong on {kept['wrong']} and undecided on {kept['undecided']}."]


def _open(found: Found) -> list[str]:
    """What the test leaves undecided of trained models, and why."""
    return [f"{told['name']} ({KINDS[told['kind']]}, t = {row['t']}, loops {row['first_loop']} to {row['last_loop']}): "
            f"{row['reason']}."
            for told in found.values() if told["kind"] in ("loop", "deep", "foreign")
            for row in told["verdict"]["table"] if row["regime"] == "undecided"]


def _parts(told: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return [told["verdict"], *([told["far"]] if "far" in told else [])]


def read_calibration(results: Path) -> dict[str, Any] | None:
    """results/calibration/calibration.json, or None if there is none of the rule's date."""
    file = results / "calibration" / "calibration.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found["thresholds"]["date"] == THRESHOLDS.date else None


def summary_text(verdict: Mapping[str, Any]) -> str:
    """The findings and the table of subjects, for a terminal."""
    heads = ("subject", "kind", "seeds", "t", "regime", "letters", "another loop", "same layer", "another layer")
    rows: list[Sequence[str]] = [heads]
    rows += [(row["subject"], row["kind"], str(row["seeds"]), row["t"], row["regime"], row["letters"],
              *(cell_text(row, name) for name in ("tau", "same_layer_tau", "other_layer_tau")))
             for row in verdict["subjects"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    said = [f"- {sentence}" for sentence in verdict["words"]]
    return "\n".join([verdict["question"], "", *lines, "", verdict["answer"], "", *said])
