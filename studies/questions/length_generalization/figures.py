"""The figure of more rows than in training: a pure function of what was measured.

    drawn = rows_figure(curves)
"""

from __future__ import annotations

import plotly.graph_objects as go
import xarray as xr

from studies.palette import BLACK, BLUE, GREEN, NEUTRAL, ORANGE, PURPLE, SKY, VERMILLION, laid_out
from studies.questions.length_generalization.judge import best_loops
from studies.zoo import SHORT_NAMES


def rows_figure(data: xr.Dataset) -> go.Figure:
    """Cells right by row: one line per number of rows, the LoopMDM solid, the deep twin dotted."""
    drawn, best = go.Figure(), best_loops(data).mean("seed")
    shades = (BLACK, BLUE, SKY, ORANGE, VERMILLION, PURPLE, GREEN)
    for kind, dash in (("loop", "solid"), ("deep", "dot")):
        for rows, colour in zip(data.n_rows.values if kind in data.kind else [], shades, strict=False):
            values = best.cells.sel(kind=kind, n_rows=rows)
            drawn.add_scatter(x=values.row.values[1:rows] + 1, y=values.values[1:rows], mode="lines+markers",
                              name=f"{SHORT_NAMES[kind]}, {rows} rows", line={"dash": dash, "color": colour})
    drawn.add_hline(y=0.5, line={"color": NEUTRAL, "dash": "dash"}, annotation_text="chance")
    laid_out(drawn, "row (the first is given)", "cells right, all masked", y_range=[0.4, 1.05], width=820, height=420)
    return drawn.update_xaxes(dtick=1)
