"""The ablation study's figures: pure functions of what was measured.

    drawn = figures(curves)                              # {title: (what am I looking at, figure)}
"""

from __future__ import annotations

import plotly.graph_objects as go
import xarray as xr

from studies.palette import BLACK, BLUE, DASHES, GREEN, NEUTRAL, ORANGE, PURPLE, SKY, VERMILLION, laid_out

ASKED = {BLACK: ("base",), BLUE: ("one", "four"), VERMILLION: ("first", "middle", "last", "all"),
         GREEN: ("injection",), ORANGE: ("layernorm", "no-qk-norm"), PURPLE: ("loop-embedding",),
         SKY: ("smax4", "smax16")}
"""What is asked of the changes, by colour (Okabe and Ito's): how many layers, which, injection, norms, embedding,
S_max."""


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
            colour, dash = style.get(change, (NEUTRAL, "solid"))
            line = curves[name].sel(change=change).dropna(curves[name].dims[-1])
            figure.add_scatter(x=line[line.dims[0]].values, y=line.values, name=change,
                               mode="lines+markers" if name == "cells" else "lines",
                               line={"color": colour, "dash": dash, "width": 3 if change == "base" else 1.8})
        laid_out(figure, x_title, y_title, log_y=log, width=860, height=440)
        if name == "cells":
            figure.update_xaxes(type="log", tickvals=[1, 2, 4, 8, 16, 32, 64])
        figure.update_yaxes(exponentformat="power")
        drawn[title] = what, figure
    return drawn
