"""The calibration's figures: pure functions of its tables.

    drawn = figures(found)                                    # {"confusion": (what am I looking at, figure), …}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from studies.palette import BLUE, NEUTRAL, SHARE, VERMILLION, laid_out

OUTCOME_COLOURS = {"right": BLUE, "undecided": NEUTRAL, "wrong": VERMILLION}


def figures(found: Mapping[str, Any]) -> dict[str, tuple[str, go.Figure]]:
    """Confusion of truth and regime, outcomes by number of examples, and the dials; what there is of them."""
    drawn = {}
    kept = next(table for table in found["confusion"] if table["kept"])
    if kept["truth"]:
        drawn["confusion"] = ("Truth by row, what the test said by column, for the calls that had no part in making "
                              "the rule.", _confusion_figure(kept))
    if found["sizes"]:
        drawn["power"] = ("Share of calls on programmes by outcome, over the number of examples.",
                          _power_figure(found["sizes"]))
    if found["dials"]:
        drawn["dials"] = ("Mean τ between the loops of the range while a control is turned from one truth to another; "
                          "a point is one seed.", _dials_figure(found["dials"]))
    return drawn


def _confusion_figure(table: Mapping[str, Any]) -> go.Figure:
    counts = table["counts"]
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    figure = go.Figure(go.Heatmap(z=shares, x=table["regimes"], y=table["truth"], text=counts, colorscale=SHARE, zmin=0,
                                  zmax=1, texttemplate="%{text}", xgap=2, ygap=2, colorbar={"title": "share of row"}))
    figure.update_yaxes(autorange="reversed")
    return laid_out(figure, "the test says", "truth", width=760, height=120 + 42 * len(counts))


def _power_figure(sizes: list[Mapping[str, Any]]) -> go.Figure:
    figure = go.Figure()
    for name, colour in OUTCOME_COLOURS.items():
        figure.add_bar(x=[str(at["value"]) for at in sizes], y=[at[name] / at["n"] for at in sizes], name=name,
                       marker_color=colour)
    figure.update_layout(barmode="stack")
    return laid_out(figure, "examples", "share of calls", y_range=[0, 1], width=560, height=360)


def _dials_figure(dials: list[Mapping[str, Any]]) -> go.Figure:
    columns = 2
    rows = -(-len(dials) // columns)
    titles = [f"{dial['family']}: {dial['control']}" for dial in dials]
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles)
    for number, dial in enumerate(dials):
        at = {"row": number // columns + 1, "col": number % columns + 1}
        points = [point for point in dial["points"] if point["tau"] is not None]
        figure.add_scatter(x=[p["dial"] for p in points], y=[p["tau"] for p in points], mode="lines",
                           line={"color": BLUE}, showlegend=False, **at)
        figure.add_scatter(x=[p["dial"] for p in points for _ in p["each"]], y=[v for p in points for v in p["each"]],
                           text=[p["called"] for p in points for _ in p["each"]], mode="markers", showlegend=False,
                           marker={"color": BLUE, "size": 8, "symbol": "circle-open"}, **at)
        figure.update_yaxes(range=[-1.05, 1.05], title_text="mean τ", **at)
        figure.update_xaxes(title_text="setting", **at)
    return laid_out(figure, "", "", width=860, height=300 * rows)
