"""More rows than in training, as words, figure and a page: pure functions of what was measured.

    text = words(curves, trained=8)
    drawn = figure(curves)
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from studies.questions.claims.page import NAMES

WHAT = ("Each model at the number of loops that serves it best; mean over training seeds. A line that stays up "
        "would be an operation that loops go on applying. The unlooped twin is in the table only.")


def best_loops(data: xr.Dataset) -> xr.Dataset:
    """Each kind at the number of loops that serves it best on each number of rows, by cells right on average."""
    quality = data.cells.mean(["row", "seed"])
    return data.isel(n_loops=quality.fillna(-1).argmax("n_loops"))


def words(data: xr.Dataset, trained: int) -> str:
    """What each kind gets right at the fewest rows and at the most."""
    cells, least, most = best_loops(data).cells.mean(["seed", "row"]), int(data.n_rows.min()), int(data.n_rows.max())
    parts = [f"{NAMES[str(kind)]} {cells.sel(kind=kind, n_rows=least):.0%} of cells at {least} rows and "
             f"{cells.sel(kind=kind, n_rows=most):.0%} at {most}" for kind in data.kind.values]
    return f"Trained on {trained} rows; guessing gets half of the cells. {'; '.join(parts)}."


def table(data: xr.Dataset) -> pd.DataFrame:
    """Cells and whole examples right, by kind (down) and number of rows (across)."""
    best = best_loops(data).mean("seed")
    return pd.DataFrame([{"model": NAMES[str(kind)], **{
        f"{n} rows": f"{best.cells.sel(kind=kind, n_rows=n).mean():.0%} of cells, "
                     f"{best.exact.sel(kind=kind, n_rows=n):.0%} whole" for n in data.n_rows.values}}
        for kind in data.kind.values])


def figure(data: xr.Dataset) -> go.Figure:
    """Cells right by row: one line per number of rows, the LoopMDM solid, the deep twin dotted."""
    drawn, best = go.Figure(), best_loops(data).mean("seed")
    shades = ["#000000", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#009E73"]
    for kind, dash in (("loop", "solid"), ("deep", "dot")):
        for rows, colour in zip(data.n_rows.values if kind in data.kind else [], shades, strict=False):
            values = best.cells.sel(kind=kind, n_rows=rows)
            drawn.add_scatter(x=values.row.values[1:rows] + 1, y=values.values[1:rows], mode="lines+markers",
                              name=f"{NAMES[kind]}, {rows} rows", line={"dash": dash, "color": colour})
    drawn.add_hline(y=0.5, line={"color": "grey", "dash": "dash"}, annotation_text="a coin")
    drawn.update_layout(template="plotly_white", width=820, height=420, margin={"l": 70, "r": 30, "t": 30, "b": 60})
    drawn.update_xaxes(title_text="row (the first is given)", dtick=1)
    drawn.update_yaxes(title_text="cells right, all masked", range=[0.4, 1.05])
    return drawn


def report(verdict: Mapping[str, Any], data: xr.Dataset) -> str:
    """HTML of the study; plotly's script comes from the network, the SVG file needs none."""
    return ("<!doctype html><meta charset='utf-8'><title>LoopScope: more rows</title>"
            "<body style='font-family:sans-serif;max-width:860px;margin:2em auto'><h1>More rows than in training</h1>"
            f"<p>{html.escape(verdict['words'])}</p>{table(data).to_html(index=False, border=0)}<p>{WHAT}</p>"
            f"{figure(data).to_html(full_html=False, include_plotlyjs='cdn')}</body>")
