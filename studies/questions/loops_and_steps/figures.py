"""Figures of loops × denoising steps: pure functions of the verdict's rows.

    drawn = figures(verdict["rows"])
    drawn["exchange"]                                         # (title, what it shows, figure)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from studies.palette import BLUE, FAINT, GREEN, NEUTRAL, ORANGE, RULE, VERMILLION, laid_out
from studies.questions.loops_and_steps.measure import WAYS

LINES = {"stay": (FAINT, "dot"), "go on": (BLUE, "solid"), "restart": (VERMILLION, "solid"),
         "true tokens": (GREEN, "dash"), "afresh": (NEUTRAL, "dot")}
"""Not the tokens of other examples: their NLL is so much higher that nothing else could be seen."""
COLUMNS = 3


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, go.Figure]]:
    """By name: title, what it shows, and the figure."""
    return {"exchange": ("Who could do the first loop of the later step?",
                         "τ of the later step's first loop, done by the first loop of the step before (blue) and by "
                         "its later loops (orange), with 95% intervals. Dotted: .25 and .5, the thresholds. "
                         "Where the first loop does no work there is nothing to exchange, and no point.",
                         exchange_figure(rows)),
            "restart": ("Writing answers and starting anew, or looping on?",
                        "NLL at the positions that are masked still, against the loop k after which half of the "
                        "answers was written. " + "; ".join(f"“{way}”: {WAYS[way]}" for way in LINES)
                        + ". Where red meets blue, a restart is as good as one more loop.",
                        restart_figure(rows))}


def exchange_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    drawn = go.Figure()
    rows = [row for row in rows if row["answer"] != "nothing"]
    for key, name, colour in (("first", "first loop", BLUE), ("later", "later loops", ORANGE)):
        values = [row[key] for row in rows]
        drawn.add_scatter(x=[row["subject"] for row in rows], y=[v["value"] for v in values], mode="markers", name=name,
                          marker={"color": colour, "size": 10},
                          error_y={"array": [v["high"] - v["value"] for v in values],
                                   "arrayminus": [v["value"] - v["low"] for v in values]})
    for threshold in (0.25, 0.5):
        drawn.add_hline(y=threshold, line={"color": RULE, "dash": "dot"})
    laid_out(drawn, "task", "τ, cut to ±1", y_range=[-1.05, 1.1], width=820, height=400)
    return drawn


def restart_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    n_rows = -(-len(rows) // COLUMNS)
    drawn = make_subplots(rows=n_rows, cols=COLUMNS, subplot_titles=[row["subject"] for row in rows],
                          vertical_spacing=0.3 / n_rows, horizontal_spacing=0.07)
    for i, row in enumerate(rows):
        loops = [one["loop"] for one in row["restarts"]]
        for way, (colour, dash) in LINES.items():
            drawn.add_scatter(x=loops, y=[one["nll"][way] for one in row["restarts"]], name=way, legendgroup=way,
                              showlegend=i == 0, mode="lines+markers", line={"color": colour, "dash": dash},
                              row=1 + i // COLUMNS, col=1 + i % COLUMNS)
    laid_out(drawn, "", "", width=900, height=120 + 230 * n_rows)
    drawn.update_xaxes(dtick=1)
    drawn.update_yaxes(rangemode="tozero")
    for column in range(1, min(COLUMNS, len(rows)) + 1):
        last = n_rows if (n_rows - 1) * COLUMNS + column <= len(rows) else n_rows - 1
        drawn.update_xaxes(title_text="loop k", row=last, col=column)
    drawn.update_yaxes(title_text="NLL [nat]", col=1)
    return drawn.update_layout(legend={"y": 1 + 0.28 / n_rows}, margin={"t": 110})
