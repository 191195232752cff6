"""Figures of the noise level: pure functions of the verdict's rows.

    drawn = figures(verdict["rows"])
    drawn["read"]                                             # (title, what it shows, figure)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from studies.palette import BLUE, NEUTRAL, ORANGE, RULE, laid_out

COLUMNS = 4


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, go.Figure]]:
    """By name: title, what it shows, and the figure."""
    return {"read": ("How well the noise level can be read, loop by loop",
                     "R² of the share that is masked, told from the state at one masked position of other examples "
                     "than those that the regression was fitted on. Grey: an untrained model of the same shape. Loop 0 "
                     "is what enters the loops.", read_figure(rows)),
            "moved": ("What moving along it does to the work of a loop, beyond random pushes",
                      "Change of the work of loop 1 when the state is moved by ± .2 of the noise level, less that of "
                      "random pushes of the same length, with 95% intervals. The band is ± δ.", moved_figure(rows))}


def read_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    n_rows = -(-len(rows) // COLUMNS)
    drawn = make_subplots(rows=n_rows, cols=COLUMNS, subplot_titles=[row["subject"] for row in rows], shared_yaxes=True,
                          vertical_spacing=0.3 / n_rows, horizontal_spacing=0.03)
    for i, row in enumerate(rows):
        at = {"row": 1 + i // COLUMNS, "col": 1 + i % COLUMNS}
        for key, name, colour in (("r2", "trained", BLUE), ("r2_untrained", "untrained", NEUTRAL)):
            if row[key] is not None:
                drawn.add_scatter(x=list(range(len(row[key]))), y=row[key], name=name, legendgroup=name,
                                  showlegend=i == 0, mode="lines+markers", line={"color": colour}, **at)
    laid_out(drawn, "", "", width=900, height=120 + 210 * n_rows)
    drawn.update_xaxes(dtick=1)
    drawn.update_yaxes(range=[-0.1, 1.05])
    for column in range(1, min(COLUMNS, len(rows)) + 1):
        last = n_rows if (n_rows - 1) * COLUMNS + column <= len(rows) else n_rows - 1
        drawn.update_xaxes(title_text="loops run", row=last, col=column)
    drawn.update_yaxes(title_text="R²", col=1)
    return drawn.update_layout(legend={"y": 1 + 0.3 / n_rows}, margin={"t": 110})


def moved_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    names, values = [row["subject"] for row in rows], [row["extra_work"] for row in rows]
    drawn = go.Figure()
    for i, row in enumerate(rows):
        drawn.add_shape(type="rect", x0=i - 0.4, x1=i + 0.4, y0=-row["delta"], y1=row["delta"], fillcolor=RULE,
                        line_width=0, layer="below")
    drawn.add_scatter(x=names, y=[v["value"] for v in values], mode="markers", showlegend=False,
                      marker={"color": ORANGE, "size": 10},
                      error_y={"array": [v["high"] - v["value"] for v in values],
                               "arrayminus": [v["value"] - v["low"] for v in values]})
    return laid_out(drawn, "task", "change of work beyond random pushes [nat]", width=820, height=360)
