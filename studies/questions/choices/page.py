"""The page of the choices: a table, and sentences that follow from it.

    text = page(rows, command="python studies/choices.py")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.questions.choices.measure import CHOICES

TITLE = "Does τ hang on how it is computed?"
BASE = next(iter(CHOICES))


def words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each choice, how far the subjects' τ moves from what the test has."""
    base = {row["subject"]: row["value"] for row in rows if row["choice"] == BASE}
    told = []
    for choice in CHOICES:
        moved = {row["subject"]: row["value"] - base[row["subject"]] for row in rows
                 if row["choice"] == choice and row["subject"] in base}
        if choice == BASE or not moved:
            continue
        most = max(moved, key=lambda subject: abs(moved[subject]))
        told.append(f"{choice[0].upper()}{choice[1:]}: moves τ by {moved[most]:+.2f} at most ({most}).")
    return told


def page(rows: Sequence[Mapping[str, Any]], *, command: str) -> str:
    """Markdown."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    cells = {(row["subject"], row["choice"]): row for row in rows}
    lines = [f"# {TITLE}", "", f"Made by `{command}`. Mean τ between the loops after the first, weighted by work, each "
             "pair cut to ±1; of several models or draws the mean, and the least and the largest in brackets.", "",
             "| choice | what it is | " + " | ".join(subjects) + " |", "|---" * (len(subjects) + 2) + "|"]
    for choice, what in CHOICES.items():
        if any((subject, choice) in cells for subject in subjects):
            lines.append(f"| {choice} | {what} | " + " | ".join(_cell(cells.get((subject, choice)))
                                                                 for subject in subjects) + " |")
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in words(rows))]) + "\n"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    each = row["each"]
    return f"{row['value']:.2f}" + (f" [{min(each):.2f}, {max(each):.2f}]" if len(each) > 1 else "")
