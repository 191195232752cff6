"""Figures of the catalogue: one per measurement, a panel per model.

    figure = drawn(ENTRIES["logit_lens"], {"automaton-loop": found})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from studies.palette import AMOUNT, AROUND_ZERO, CATEGORIES, NEUTRAL, laid_out
from studies.questions.catalogue.entries.entry import CatalogueEntry

COLUMNS = 3
PANEL = (400, 300)
"""Width and height of a panel."""
MOST_CURVES = 8

AXES = {"depth": "depth: layers as they run", "loop": "loop", "loops": "loops run", "pos": "position",
        "quantity": "", "alpha": "α", "dose": "dose [RMS of the states]", "component": "component", "layer": "layer",
        "exponent": "exponent", "head": "head", "depth_b": "depth", "trained_depth": "trained at depth",
        "receiver": "read by loop", "sender": "written by loop", "clean_loop": "clean state after loop",
        "content": "content of loop", "operation": "operation of loop", "step": "denoising step"}


def drawn(entry: CatalogueEntry, found: Mapping[str, xr.Dataset]) -> go.Figure:
    """The values of one entry, model by model: curves with 95% bands and a dashed null, or maps."""
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    gap = 0.25 if rows == 1 else 0.45 / rows
    figure = make_subplots(rows, columns, subplot_titles=list(found), horizontal_spacing=0.09, vertical_spacing=gap)
    limits = _limits(found)
    for number, values in enumerate(found.values()):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        if entry.matrix and values.value.ndim == 2:
            _map(figure, values, place, limits, first=number == 0)
        elif values.value.dims[-1] == "quantity":
            _bars(figure, values, place)
        else:
            _curves(figure, entry, values, place, first=number == 0)
    unit = next(iter(found.values())).value.attrs.get("units", "1")
    name = next(iter(found.values())).value.attrs.get("long_name", entry.name)
    laid_out(figure, "", "", width=columns * PANEL[0] + 120, height=rows * PANEL[1] + 110)
    figure.update_layout(title={"text": name + (f" [{unit}]" if unit not in ("", "1") else ""), "font": {"size": 13}},
                         legend={"y": -0.28 / rows, "x": 0}, margin={"t": 70, "b": 80})
    return figure


def _curves(figure: go.Figure, entry: CatalogueEntry, found: xr.Dataset, place: dict[str, int], first: bool) -> None:
    value = found.value
    along = str(value.dims[-1])
    names = [""] if value.ndim == 1 else [_label(str(value.dims[0]), v) for v in _coordinate(value, str(value.dims[0]))]
    x = _coordinate(value, along)
    for i, name in enumerate(names[:MOST_CURVES]):
        colour = CATEGORIES[i % len(CATEGORIES)]
        part = found if value.ndim == 1 else found.isel({value.dims[0]: i})
        if "low" in part:
            both = np.concatenate([part.high.values, part.low.values[::-1]])
            fine = np.isfinite(both)
            figure.add_scatter(x=np.concatenate([x, x[::-1]])[fine], y=both[fine], fill="toself", fillcolor=colour,
                               mode="lines", opacity=0.15, line={"width": 0}, hoverinfo="skip", showlegend=False,
                               **place)
        figure.add_scatter(x=x, y=part.value.values, mode="lines+markers", line={"color": colour}, marker={"size": 5},
                           name=name, legendgroup=name, showlegend=bool(name) and first, **place)
        if "null" in part:
            null = np.broadcast_to(part.null.values, part.value.shape)
            figure.add_scatter(x=x, y=null, mode="lines", connectgaps=True, name=entry.null or "null",
                               line={"color": NEUTRAL if not name else colour, "dash": "dash"}, legendgroup="null",
                               showlegend=first and i == 0, **place)
    _axis(figure, value, along, place)


def _bars(figure: go.Figure, found: xr.Dataset, place: dict[str, int]) -> None:
    value = found.value
    error = {"type": "data", "symmetric": False, "array": found.high.values - value.values,
             "arrayminus": value.values - found.low.values} if "low" in found else None
    figure.add_bar(x=list(value["quantity"].values), y=value.values, error_y=error, marker_color=CATEGORIES[0],
                   showlegend=False, **place)
    if "null" in found:
        figure.add_scatter(x=list(value["quantity"].values), y=np.broadcast_to(found.null.values, value.shape),
                           mode="markers", marker={"symbol": "line-ew-open", "size": 26, "color": NEUTRAL}, name="null",
                           showlegend=False, **place)


def _map(figure: go.Figure, found: xr.Dataset, place: dict[str, int], limits: tuple[float, float], first: bool) -> None:
    value = found.value
    down, along = map(str, value.dims)
    signed = limits[0] < 0
    figure.add_heatmap(z=value.values, x=_coordinate(value, along), y=_coordinate(value, down), showscale=first,
                       zmin=-max(-limits[0], limits[1]) if signed else limits[0],
                       zmax=max(-limits[0], limits[1]) if signed else limits[1],
                       colorscale=AROUND_ZERO if signed else AMOUNT, colorbar={"thickness": 12}, **place)
    _axis(figure, value, along, place)
    figure.update_yaxes(title_text=AXES.get(down, down), autorange="reversed", **place)


def _axis(figure: go.Figure, value: xr.DataArray, along: str, place: dict[str, int]) -> None:
    figure.update_xaxes(title_text=AXES.get(along, along), **place)
    if along == "depth" and "loop" in value.coords:
        loops = value.loop.values
        begins = [i for i in range(len(loops)) if i == 0 or loops[i] != loops[i - 1]]
        looped = loops.max() > 0
        names = [("head" if i == 0 else "tail") if loops[i] < 0 else f"loop {loops[i]}" if looped else "mid"
                 for i in begins]
        figure.update_xaxes(tickvals=value.depth.values[begins], ticktext=names, tickangle=-45, **place)
    elif value.sizes[along] <= MOST_CURVES + 2 and along not in ("dose", "alpha"):
        figure.update_xaxes(tickvals=_coordinate(value, along), **place)


def _coordinate(value: xr.DataArray, dim: str) -> np.ndarray:
    return value[dim].values if dim in value.indexes else np.arange(value.sizes[dim])


def _label(dim: str, value: Any) -> str:
    return str(value) if dim in ("effect", "quantity") else f"{AXES.get(dim, dim)} {value}"


def _limits(found: Mapping[str, xr.Dataset]) -> tuple[float, float]:
    values = np.concatenate([part.value.values.ravel() for part in found.values()])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
