"""The calibration in decisions: right, wrong or undecided per case, tables over cases, and sentences made from them.

    outcome({"truth": "programme", "sequence": "ABAB", "regime": "programme", "letters": "ABAB"})   # "right"
    found = judge(rows)
    found["words"], found["criteria"], found["confusion"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]
Outcome = Literal["right", "undecided", "wrong"]

REGIMES = ("iterating", "programme", "unrolled", "drifting", "settled", "nothing", "undecided")
EXACT = 1e-4
"""How far τ may lie apart between two models that compute the same."""
CRITERIA = {"right": 0.95, "wrong": 0.05, "undecided": 0.15}
"""Least share of decided cases that is right; greatest shares of all that are wrong, and undecided."""


# -------------------------------------------------------------------------- one case

def regime_of_sequence(sequence: str) -> str:
    """What the rule should call a programme: loop 0 stands apart unless it shares its letter, or there are but two."""
    judged = sequence[1:] if len(sequence) > 2 else sequence
    if len(set(judged)) == 1:
        return "iterating"
    all_differ = len(set(judged)) == len(judged) and (judged == sequence or sequence[0] not in judged)
    return "unrolled" if all_differ else "programme"


def lettered(letters: str) -> str:
    """The same sequence with the letters A, B, … in the order in which they first come."""
    names: dict[str, str] = {}
    return "".join(letter if not letter.isalpha() else names.setdefault(letter, chr(ord("A") + len(names)))
                   for letter in letters)


def consistent(letters: str, sequence: str) -> bool:
    """Whether decided letters are equal where those of the sequence are, and only there; "?" is not decided."""
    known = [(letter, true) for letter, true in zip(letters, sequence, strict=True) if letter != "?"]
    return all((a == b) == (x == y) for a, x in known for b, y in known)


def outcome(row: Row) -> Outcome | None:
    """Whether a case came out right; None for dials, weights per loop, identities and shuffled content."""
    truth, regime = row["truth"], row.get("regime")
    if truth == "programme":
        if regime == "undecided":
            return "undecided"
        agree = consistent(str(row["letters"]), str(row["sequence"]))
        return "right" if regime == regime_of_sequence(str(row["sequence"])) and agree else "wrong"
    expected = EXPECTED.get(truth)
    if expected is None:
        return None
    right, no_statement = expected
    return "right" if regime in right else "undecided" if regime in no_statement else "wrong"


EXPECTED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "never the same": (("unrolled", "drifting", "programme"), ("undecided", "nothing", "settled")),
    "settled": (("settled",), ("undecided",)),
    "idle": (("nothing", "settled"), ("undecided",)),
    "nothing": (("nothing",), ("undecided",))}
"""By truth: regimes that are right, and regimes that make no statement about it (loops that surgery has left without
work are no evidence of what they would do). Weights per loop are not among them: other weights may well compute the
same, so that nothing is forced."""


def truth_name(row: Row) -> str:
    """The truth of a case as tables call it."""
    return regime_of_sequence(row["sequence"]) if row["truth"] == "programme" else str(row["truth"])


# ------------------------------------------------------------------------- all cases

def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """Tables, criteria and sentences of the calibration, for JSON."""
    whole = whole_calls(rows)
    confusion = [_confusion(whole, kept) for kept in (True, False)]
    found = {"confusion": confusion, "totals": {"kept": totals(whole, True), "looked at": totals(whole, False)},
             "sizes": _by(rows, "n", ("codec", "fresh codec")), "families": _by(whole, "family", None),
             "dials": _dials(rows)}
    return {"criteria": criteria(rows), "words": told_in_words(rows), **found}


def whole_calls(rows: Sequence[Row]) -> list[Row]:
    """The calls of each control with the most examples; calls with fewer count in the table by examples alone."""
    most: dict[tuple[str, str], int] = {}
    for row in rows:
        at = (row["family"], row["control"])
        most[at] = max(most.get(at, 0), row["n"])
    return [row for row in rows if row["n"] == most[row["family"], row["control"]]]


def totals(rows: Iterable[Row], kept: bool | None = None) -> dict[str, Any]:
    """Numbers and shares of right, wrong and undecided cases."""
    seen = Counter(result for row in rows if kept in (None, row["kept"]) and (result := outcome(row)))
    n = sum(seen.values())
    decided = seen["right"] + seen["wrong"]
    return {"n": n, **{name: seen[name] for name in ("right", "wrong", "undecided")},
            "right_of_decided": seen["right"] / decided if decided else None,
            "wrong_share": seen["wrong"] / n if n else None, "undecided_share": seen["undecided"] / n if n else None}


def criteria(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was asked of the test, what came out on the kept cases, and whether that holds."""
    kept = totals(whole_calls(rows), True)
    untrained = [row for row in rows if row["truth"] == "nothing"]
    false = sum(outcome(row) == "wrong" for row in untrained)
    shapes = len({row["control"] for row in untrained})
    apart = [row for row in rows if row["truth"] == "identity"]
    found = [
        _criterion(f"right, of decided (≥ {CRITERIA['right']:.0%})", kept["right_of_decided"],
                   lambda v: v >= CRITERIA["right"], "{:.1%}"),
        _criterion(f"wrong (≤ {CRITERIA['wrong']:.0%})", kept["wrong_share"], lambda v: v <= CRITERIA["wrong"],
                   "{:.1%}"),
        _criterion(f"undecided (≤ {CRITERIA['undecided']:.0%})", kept["undecided_share"],
                   lambda v: v <= CRITERIA["undecided"], "{:.1%}"),
        _criterion(f"untrained models called anything but nothing or undecided (0 of at least 40 of 5 shapes; here "
                   f"{len(untrained)} of {shapes})", false if untrained else None,
                   lambda v: v == 0 and len(untrained) >= 40 and shapes >= 5, "{:.0f}")]
    for family in sorted({row["family"] for row in apart}):
        worst = max(max(row["tau_loop"], row["tau_layer_relative"]) for row in apart if row["family"] == family)
        found.append(_criterion(f"{family}: τ apart by at most {EXACT:g}", worst, lambda v: v <= EXACT, "{:.1e}"))
    return found


def _criterion(name: str, value: float | None, holds: Any, form: str) -> dict[str, Any]:
    return {"name": name, "value": None if value is None else form.format(value),
            "met": None if value is None else bool(holds(value))}


def told_in_words(rows: Sequence[Row]) -> list[str]:
    """What may be quoted; every number is counted here."""
    told = []
    for kept, name in ((True, "On what had no part in making the rule"), (False, "On what was looked at")):
        if (t := totals(whole_calls(rows), kept))["n"]:
            told.append(f"{name}, {t['n']} calls with a known truth: {t['right']} right, {t['wrong']} wrong, "
                        f"{t['undecided']} undecided{_of_decided(t)}.")
    if untrained := [row for row in rows if row["truth"] == "nothing"]:
        false = sum(outcome(row) == "wrong" for row in untrained)
        told.append(f"{false} of {len(untrained)} untrained models of {len({r['control'] for r in untrained})} shapes "
                    "are called anything but nothing or undecided.")
    told += _on_programmes(rows)
    told += _on_sizes(rows)
    for family in sorted({row["family"] for row in rows if row["truth"] == "identity"}):
        of = [row for row in rows if row["family"] == family]
        told.append(f"{family[0].upper() + family[1:]} differ by at most {max(r['logits'] for r in of):.1e} in their "
                    f"logits and {max(r['tau_loop'] for r in of):.1e} in τ of loops, on {_listed(of)}.")
    if shuffled := [row for row in rows if row["truth"] == "shuffled"]:
        told.append(f"With the content of another example τ is {max(row['tau'] for row in shuffled):.2f} at most as a "
                    f"mean over pairs of loops, in {len(shuffled)} runs.")
    if own := [row for row in rows if row["truth"] == "own weights"]:
        called = Counter(str(row["regime"]) for row in own)
        told.append("Loops whose MLPs or attention are their own, drawn anew and trained for some steps, are called "
                    + ", ".join(f"{name} ({n} of {len(own)})" for name, n in called.items())
                    + "; nothing is counted here, since other weights may compute the same.")
    told += _on_dials(rows)
    return told + [f"Wrong: {row['key']}: called {row['regime']} ({row['letters']}), and is {truth_name(row)}"
                   f"{' ' + lettered(row['sequence']) if row['sequence'] else ''}."
                   for row in rows if outcome(row) == "wrong"]


# ------------------------------------------------------------------------------ private

def _of_decided(t: Mapping[str, Any]) -> str:
    return "" if t["right_of_decided"] is None else f" ({t['right_of_decided']:.0%} of the decided ones are right)"


def _listed(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(str(row["control"]) for row in rows))


def _on_programmes(rows: Sequence[Row]) -> list[str]:
    """τ within and between operations, of codecs as they are and of turned ones."""
    told = []
    most = max((row["n"] for row in rows if row["truth"] == "programme"), default=0)
    for turned, name, suffix in ((False, "τ", ""), (True, "Aligned τ", "_aligned")):
        of = [row for row in rows if row["truth"] == "programme" and row["n"] == most
              and turned == ("turned" in row["control"])]
        equal = [row[f"least_equal{suffix}"] for row in of if row.get(f"least_equal{suffix}") is not None]
        other = [row[f"largest_different{suffix}"] for row in of if row.get(f"largest_different{suffix}") is not None]
        parts = ([f"at least {min(equal):.2f} between loops of the same operation"] if equal else []) + (
            [f"at most {max(other):.2f} between loops of different ones (the lesser direction)"] if other else [])
        if parts:
            told.append(f"{name} of {'turned ' if turned else ''}programmes with {most} examples: "
                        f"{', and '.join(parts)}.")
    return told


def _on_sizes(rows: Sequence[Row]) -> list[str]:
    counted = _by(rows, "n", ("codec", "fresh codec"))
    if not counted:
        return []
    return ["Of the programmes, right: " + "; ".join(
        f"{c['right']} of {c['n']} with {c['value']} examples ({c['wrong']} wrong)" for c in counted) + "."]


def _on_dials(rows: Sequence[Row]) -> list[str]:
    told = []
    for dial in _dials(rows):
        first, last = dial["points"][0], dial["points"][-1]
        if None in (first["tau"], last["tau"]) or first is last:
            continue
        change = last["tau"] - first["tau"]
        moves = "rises" if change > 0 else "falls" if change < 0 else "stays"
        told.append(f"{dial['family'][0].upper() + dial['family'][1:]} ({dial['control']}), from {first['dial']:g} to "
                    f"{last['dial']:g}: mean τ {moves} from {first['tau']:.2f} to {last['tau']:.2f}; called "
                    f"{first['called']} at the one end and {last['called']} at the other.")
    return told


def _confusion(rows: Iterable[Row], kept: bool) -> dict[str, Any]:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if row["kept"] == kept and outcome(row) is not None:
            counts.setdefault(truth_name(row), Counter())[row["regime"]] += 1
    return {"kept": kept, "truth": list(counts), "regimes": list(REGIMES),
            "counts": [[counts[truth][regime] for regime in REGIMES] for truth in counts]}


def _by(rows: Sequence[Row], key: str, families: Sequence[str] | None) -> list[dict[str, Any]]:
    """Totals by the value of a column; only cases with a verdict."""
    chosen = [row for row in rows if outcome(row) is not None and (families is None or row["family"] in families)]
    return [{"value": value, **totals([row for row in chosen if row[key] == value])}
            for value in dict.fromkeys(sorted((row[key] for row in chosen), key=str if key != "n" else int))]


def _dials(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each dial's points: mean τ over seeds, and what the regimes were."""
    found: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for row in rows:
        if row["truth"] == "dial":
            found.setdefault((row["family"], row["control"]), {}).setdefault(row["dial"], []).append(row)
    dials = []
    for (family, control), settings in found.items():
        points = []
        for dial, of in sorted(settings.items()):
            known = [row["tau"] for row in of if row["tau"] is not None]
            accuracy = [row["accuracy"] for row in of if row.get("accuracy") is not None]
            points.append({"dial": dial, "tau": sum(known) / len(known) if known else None, "each": known,
                           "accuracy": sum(accuracy) / len(accuracy) if accuracy else None,
                           "called": " and ".join(dict.fromkeys(str(row["regime"]) for row in of)),
                           "letters": [row["letters"] for row in of]})
        dials.append({"family": family, "control": control, "points": points})
    return dials
