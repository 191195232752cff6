"""The ablation study as words, table, figures and a page: pure functions of what was measured.

    text = page(verdict)                                 # results/ablations.md
    drawn = figures(curves)                              # {title: (what am I looking at, figure)}
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

CHANGES = {
    "base": "layers 1 and 2 of six looped, S ≤ 8", "one": "one looped layer", "four": "four looped layers",
    "first": "layers 0 and 1 looped", "middle": "layers 2 and 3 looped", "last": "layers 4 and 5 looped",
    "all": "all six layers looped", "injection": "input injected at each loop", "layernorm": "LayerNorm for RMSNorm",
    "no-qk-norm": "queries and keys not normalised", "loop-embedding": "a learned vector per loop",
    "smax4": "S ≤ 4 in training", "smax16": "S ≤ 16 in training"}
"""What each change is, in words."""

ASKED = {"black": ("base",), "#0072B2": ("one", "four"), "#D55E00": ("first", "middle", "last", "all"),
         "#009E73": ("injection",), "#E69F00": ("layernorm", "no-qk-norm"), "#CC79A7": ("loop-embedding",),
         "#56B4E9": ("smax4", "smax16")}
"""What is asked of the changes, by colour (Okabe and Ito's): how many layers, which, injection, norms, embedding,
S_max."""

DASHES = ("solid", "dash", "dot", "dashdot")

SHARES = {"exact", "exact_more", "cells_once", "converged", "cyclic"}

TITLE = "What decides whether the state's direction settles"

SMALLEST = 0.05
"""A change is told if it leaves the range of the base's seeds by at least this share."""
GROWS = 1.1
"""From this growth of its norm between loops 8 and 32 on, a state is said to grow."""


def words(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changes move by at least `SMALLEST` beyond the range of the base's seeds, and whether states grow."""
    base = next(row for row in table if row["change"] == "base")["values"]
    sentences = []
    for key, noun in (("converged", "the share of states whose direction settles"),
                      ("exact", "the share of examples right at S_max")):
        seeds = _finite(base[key])
        if not len(seeds):
            continue
        low, high = round(float(seeds.min()), 2), round(float(seeds.max()), 2)   # as printed
        outside = [(row["change"], round(float(_finite(row["values"][key]).mean()), 2)) for row in table
                   if row["change"] != "base" and len(_finite(row["values"][key]))]
        above = [f"{CHANGES.get(c, c)} ({v:.2f})" for c, v in outside if round(v - high, 2) >= SMALLEST]
        below = [f"{CHANGES.get(c, c)} ({v:.2f})" for c, v in outside if round(low - v, 2) >= SMALLEST]
        spread = f"{low:.2f}" if len(seeds) == 1 else f"{low:.2f} to {high:.2f} over {len(seeds)} seeds"
        sentences.append(f"In the base {noun} is {spread}. Higher than that by at least {SMALLEST:g}: "
                         f"{', '.join(above) or 'none'}; lower by as much: {', '.join(below) or 'none'}.")
    return sentences + _on_growth(table)


def _on_growth(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Do states come to rest at all? Their norms say."""
    growth = [float(seen.mean()) for row in table if len(seen := _finite(row["values"]["norm_growth"]))]
    if not growth:
        return []
    growing = sum(factor >= GROWS for factor in growth)
    sentence = (f"From loop 8 to loop 32 the norm of the state grows by a factor of {min(growth):.1f} to "
                f"{max(growth):.1f}")
    if growing == len(growth):
        return [f"{sentence} in all {growing} variants: no state comes to rest, and only its direction can settle."]
    return [f"{sentence}, by {GROWS:g} or more in {growing} of {len(growth)} variants; there no state comes to rest, "
            "and only its direction can settle."]


def figures(curves: xr.Dataset) -> dict[str, tuple[str, go.Figure]]:
    """Accuracy over S, and over loops how far the state's direction is from its last one and turns; a line per change.
    """
    style = {change: (colour, dash) for colour, changes in ASKED.items()
             for change, dash in zip(changes, DASHES, strict=False)}
    drawn = {}
    for name, title, what, x_title, y_title, log in (
            ("cells", "Accuracy over loops", "Each line is one change; the base is black, a colour is one question.",
             "loops S in one forward", "share of free cells right", False),
            ("distance", "Distance of the direction from its last one", "States scaled to norm 1; X* is the state "
             "after 128 loops. The norm is not seen here, and may grow all the while.", "loop",
             "‖X_k − X*‖, states of norm 1", True),
            ("step", "Step size", "How far the direction of the state still turns in a loop.", "loop",
             "‖X_k − X_(k−1)‖, states of norm 1", True)):
        figure = go.Figure()
        known = [change for change in style if change in curves.change]
        for change in [*known, *(other for other in curves.change.values.tolist() if other not in style)]:
            colour, dash = style.get(change, ("grey", "solid"))
            line = curves[name].sel(change=change).dropna(curves[name].dims[-1])
            figure.add_scatter(x=line[line.dims[0]].values, y=line.values, name=change,
                               mode="lines+markers" if name == "cells" else "lines",
                               line={"color": colour, "dash": dash, "width": 3 if change == "base" else 1.8})
        figure.update_layout(template="plotly_white", width=860, height=440,
                             margin={"l": 70, "r": 20, "t": 30, "b": 60})
        figure.update_xaxes(title_text=x_title, type="log" if name == "cells" else None,
                            **({"tickvals": [1, 2, 4, 8, 16, 32, 64]} if name == "cells" else {}))
        figure.update_yaxes(title_text=y_title, type="log" if log else None, exponentformat="power")
        drawn[title] = what, figure
    return drawn


def rows(verdict: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table: a row per change, a column per measure, mean over seeds (and range where there are several)."""
    measures = verdict["measures"]
    return [{"change": row["change"], "what": CHANGES.get(row["change"], ""),
             **{measures[key]["name"]: _cell(key, row["values"][key]) for key in measures}}
            for row in verdict["ablations"]]


def notes(verdict: Mapping[str, Any]) -> list[str]:
    """Why numbers of the table are not defined, a sentence per measure."""
    told = []
    for key, measure in verdict["measures"].items():
        gaps = [row["change"] for row in verdict["ablations"] if not len(_finite(row["values"][key]))]
        if gaps:
            told.append(f"{measure['name'][:1].upper()}{measure['name'][1:]} ({', '.join(gaps)}): not defined because "
                        f"{measure['undefined']}.")
    return told


def page(verdict: Mapping[str, Any]) -> str:
    """results/ablations.md."""
    listed = rows(verdict)
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
             *["| " + " | ".join(row.values()) + " |" for row in listed], "", *(f"{note}\n" for note in notes(verdict)),
             *[f"- *{m['name']}*: {m['definition']}." for m in verdict["measures"].values()], "",
             f"Figures: [live](ablations-{verdict['task']}/report.html)."]
    return "\n".join(lines) + "\n"


def report(verdict: Mapping[str, Any], drawn: Mapping[str, tuple[str, go.Figure]]) -> str:
    """One page that needs no network: words, table, figures, provenance."""
    listed = rows(verdict)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in listed[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>"
                   for row in listed)
    told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdict["words"])
    told_of_gaps = "".join(f"<p>{html.escape(note)}</p>" for note in notes(verdict))
    parts = [f"<h1>{TITLE}</h1><ul>{told}</ul><table><tr>{head}</tr>{body}</table>{told_of_gaps}"]
    for number, (title, (what, figure)) in enumerate(drawn.items()):
        picture = figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(what)}</p>{picture}")
    parts.append(f"<pre>{html.escape(json.dumps(verdict['provenance'], indent=1))}</pre>")
    style = ("body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto}table{border-collapse:collapse;"
             "font-size:.8em}td,th{border-bottom:1px solid #ddd;padding:.3em .5em;text-align:left}")
    return (f"<!doctype html><meta charset='utf-8'><title>LoopScope: ablations</title><style>{style}</style>"
            f"<body>{''.join(parts)}</body>")


def _finite(values: Sequence[float | None]) -> np.ndarray:
    """The values that are defined; None stands for one that is not, as in JSON."""
    return np.array([value for value in values if value is not None])


def _cell(key: str, values: Sequence[float | None]) -> str:
    seen = _finite(values)
    if not len(seen):
        return "not defined"

    def one(value: float) -> str:
        return f"{value:.1%}" if key in SHARES else f"{value:.3g}"

    mean = one(float(seen.mean()))
    return mean if len(seen) == 1 else f"{mean} [{one(float(seen.min()))}, {one(float(seen.max()))}]"
