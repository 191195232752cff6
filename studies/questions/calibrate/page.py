"""The calibration's pages: results/calibration/page.md and report.html, all words made from the tables.

    text = page(stored)                                       # stored: calibration.json as it was read
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from studies.questions.calibrate.judge import REGIMES
from studies.questions.calibrate.measure import CHANGED, CONTROLS

TITLE = "Does the stage test say what is true?"
ASKED = ("Every control below is a model whose truth is known by construction: programmes trained into shared blocks "
         "(codecs), a looped block that computes what an unlooped model computes and the reverse, loops far beyond "
         "training, untrained models; and some between two truths. The stage test is called on each without being "
         "told. *Kept* calls had no part in making the rule: odd seeds, programmes of the operations E to H, and all "
         "surgery on the task arithmetic (`studies/questions/calibrate/measure.py` has the list). Where the number of "
         "examples is varied, calls with fewer than the most count in the row on examples alone.")


def page(stored: Mapping[str, Any], pictures: tuple[str, ...] = ()) -> str:
    """Markdown; ``pictures`` are the names of figures that lie beside it as SVG files."""
    found, missing = stored["found"], stored.get("missing", 0)
    lines = [f"# {TITLE}", "", f"Made by `{stored['provenance']['program']}` in "
             f"{stored['provenance']['seconds'] / 60:.0f} minutes; rule of {stored['thresholds']['date']}."
             + (f" {missing} cases were not run yet." if missing else ""), "", ASKED,
             "", *(f"- {sentence}" for sentence in found["words"]), "", "| asked | came out | holds |", "|---|---|---|",
             *(f"| {c['name']} | {c['value'] or 'not measured'} | {MET[c['met']]} |" for c in found["criteria"])]
    for table in found["confusion"]:
        if table["truth"]:
            name = "kept" if table["kept"] else "looked at"
            lines += ["", f"## Truth and verdict, {name}", "", "| truth | " + " | ".join(REGIMES) + " |",
                      "|---" * (len(REGIMES) + 1) + "|",
                      *(f"| {truth} | " + " | ".join(str(n or "") for n in counts) + " |"
                        for truth, counts in zip(table["truth"], table["counts"], strict=True))]
    lines += ["", "*never the same*: " + CONTROLS["never the same"]
              + "; *settled*: " + CONTROLS["settled"] + "; *idle*: " + CONTROLS["idle"] + "; *nothing*: "
              + CONTROLS["nothing"] + ".", "",
              "## By kind of control", "", "| kind | calls | right | wrong | undecided |", "|---|---|---|---|---|",
              *(f"| {f['value']} | {f['n']} | {f['right']} | {f['wrong']} | {f['undecided']} |"
                for f in found["families"])]
    for dial in found["dials"]:
        lines += ["", f"## {dial['family'][0].upper() + dial['family'][1:]}: {dial['control']}", "",
                  "| setting | mean τ | bits right | called | letters |", "|---|---|---|---|---|",
                  *(f"| {p['dial']:g} | {_told(p['tau'])} | {_told(p['accuracy'])} | {p['called']} | "
                    f"{', '.join(p['letters'])} |" for p in dial["points"])]
    lines += ["", "## What was changed after a look at results", "", *(f"- {change}" for change in CHANGED)]
    lines += ["", "Figures: [live](report.html).", *(f"\n![{name}]({name}.svg)" for name in pictures)]
    return "\n".join(lines) + "\n"


MET = {True: "yes", False: "no", None: "–"}


def html_report(stored: Mapping[str, Any], drawn: Mapping[str, tuple[str, go.Figure]]) -> str:
    """One page that needs no network: sentences, criteria, figures."""
    found = stored["found"]
    told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found["words"])
    asked = "".join(f"<tr><td>{html.escape(c['name'])}</td><td>{html.escape(c['value'] or 'not measured')}</td>"
                    f"<td>{MET[c['met']]}</td></tr>" for c in found["criteria"])
    parts = [f"<h1>{TITLE}</h1><p>{html.escape(ASKED)}</p><ul>{told}</ul><table>{asked}</table>"]
    for number, (name, (what, figure)) in enumerate(drawn.items()):
        picture = figure.to_html(full_html=False, include_plotlyjs=number == 0,
                                 config={"displaylogo": False})
        parts.append(f"<h2>{name}</h2><p>{html.escape(what)}</p>{picture}")
    style = ("body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto}table{border-collapse:collapse}"
             "td{border-bottom:1px solid #ddd;padding:.3em .6em}")
    return (f"<!doctype html><meta charset='utf-8'><title>LoopScope: calibration</title><style>{style}</style>"
            f"<body>{''.join(parts)}</body>")


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
