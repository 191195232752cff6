"""The ablation study as table and pages: pure functions of what was measured.

    text = page(verdict)                                 # results/ablations.md
    html = report(verdict, figures(curves))              # results/ablations-<task>/report.html
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from studies.questions.ablations.judge import CHANGES, defined_values

SHARES = {"exact", "exact_more", "cells_once", "converged", "cyclic"}

TITLE = "What decides whether the state's direction settles"

def table_rows(verdict: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table: a row per change, a column per measure, mean over seeds (and range where there are several)."""
    measures = verdict["measures"]
    return [{"change": row["change"], "what": CHANGES.get(row["change"], ""),
             **{measures[key]["name"]: _cell(key, row["values"][key]) for key in measures}}
            for row in verdict["ablations"]]


def undefined_notes(verdict: Mapping[str, Any]) -> list[str]:
    """Why numbers of the table are not defined, a sentence per measure."""
    told = []
    for key, measure in verdict["measures"].items():
        gaps = [row["change"] for row in verdict["ablations"] if not len(defined_values(row["values"][key]))]
        if gaps:
            told.append(f"{measure['name'][:1].upper()}{measure['name'][1:]} ({', '.join(gaps)}): not defined because "
                        f"{measure['undefined']}.")
    return told


def page(verdict: Mapping[str, Any]) -> str:
    """results/ablations.md."""
    listed = table_rows(verdict)
    setting = verdict["setting"]
    task = ", ".join(f"{key} {value}" for key, value in setting["task"].items() if key != "name")
    intro = (f"Made by `python studies/ablations.py`: LoopMDMs of six layers on *{verdict['task']}* ({task}), one "
             f"change each, trained for the same FLOPs; {setting['examples']} held-out examples, every free position "
             "masked. "
             "Ranges in brackets are over training seeds; a number without one is a single run, and says little unless "
             "it lies far outside the base's range.")
    lines = [f"# {TITLE}", "", intro, "",
             *[f"- {sentence}" for sentence in verdict["words"]], "",
             "| " + " | ".join(listed[0]) + " |", "|---" * len(listed[0]) + "|",
             *["| " + " | ".join(row.values()) + " |" for row in listed], "",
             *(f"{note}\n" for note in undefined_notes(verdict)),
             *[f"- *{m['name']}*: {m['definition']}." for m in verdict["measures"].values()], "",
             f"Figures: [live](ablations-{verdict['task']}/report.html)."]
    return "\n".join(lines) + "\n"


def report(verdict: Mapping[str, Any], drawn: Mapping[str, tuple[str, go.Figure]]) -> str:
    """One page that needs no network: words, table, figures, provenance."""
    listed = table_rows(verdict)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in listed[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>"
                   for row in listed)
    told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdict["words"])
    told_of_gaps = "".join(f"<p>{html.escape(note)}</p>" for note in undefined_notes(verdict))
    parts = [f"<h1>{TITLE}</h1><ul>{told}</ul><table><tr>{head}</tr>{body}</table>{told_of_gaps}"]
    for number, (title, (what, figure)) in enumerate(drawn.items()):
        picture = figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(what)}</p>{picture}")
    parts.append(f"<pre>{html.escape(json.dumps(verdict['provenance'], indent=1))}</pre>")
    style = ("body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto}table{border-collapse:collapse;"
             "font-size:.8em}td,th{border-bottom:1px solid #ddd;padding:.3em .5em;text-align:left}")
    return (f"<!doctype html><meta charset='utf-8'><title>LoopScope: ablations</title><style>{style}</style>"
            f"<body>{''.join(parts)}</body>")


def _cell(key: str, values: Sequence[float | None]) -> str:
    seen = defined_values(values)
    if not len(seen):
        return "not defined"

    def one(value: float) -> str:
        return f"{value:.1%}" if key in SHARES else f"{value:.3g}"

    mean = one(float(seen.mean()))
    return mean if len(seen) == 1 else f"{mean} [{one(float(seen.min()))}, {one(float(seen.max()))}]"
