"""Figures of attention: whole patterns, where one position looks, and flows between masked and visible.

    figure = pattern_maps(pattern, titles, regions, "row", names=task.position_names())    # pattern [panel, query, key]
    figure = flow_curves(summary, "masked", "masked", over_chance=True)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from app.figures.style import colourbar, depth_axis, depth_names, region_ticks, styled
from studies.palette import CATEGORIES, DIVIDER, FAINT, INK, RULE, SHARE


def pattern_maps(pattern: Float[np.ndarray, "panel query key"], titles: Sequence[str], regions: Int[np.ndarray, "pos"],
                 region_name: str, *, names: Sequence[str], columns: int = 4) -> go.Figure:
    """Attention patterns side by side on one scale, which ends at the 99.5th percentile of what is shown."""
    columns = min(columns, len(pattern))
    n_rows = -(-len(pattern) // columns)
    size = {1: 460, 2: 420}.get(columns, 270 if columns <= 4 else 210)
    total = n_rows * size + 60
    figure = make_subplots(n_rows, columns, subplot_titles=list(titles), horizontal_spacing=0.12 / columns,
                           vertical_spacing=56 / total if n_rows > 1 else 0, shared_yaxes=True)
    top = float(np.quantile(pattern, 0.995))
    _, ticks = region_ticks(regions, pixels=size - 60)
    for i, matrix in enumerate(pattern):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        figure.add_trace(go.Heatmap(z=np.round(matrix, 4), x=list(range(len(names))), coloraxis="coloraxis",
                                    hovertemplate=f"query %{{y}} → key %{{x}}<br>%{{z:.3f}}<extra>{titles[i]}</extra>"),
                         **place)
    for j in range(len(pattern), n_rows * columns):
        figure.update_xaxes(visible=False, row=j // columns + 1, col=j % columns + 1)
    styled(figure, height=total, legend=False)
    figure.update_annotations(font={"size": 12, "color": FAINT})
    frame = {"showgrid": False, "tickfont": {"size": 10}, "mirror": True, "showline": True, "linecolor": RULE}
    figure.update_xaxes(**frame, **ticks)
    figure.update_yaxes(autorange="reversed", **frame, **ticks)
    figure.update_xaxes(title_text=f"key, by {region_name}", title_font_size=11, row=n_rows)
    figure.update_yaxes(title_text=f"query, by {region_name}", title_font_size=11, col=1)
    figure.update_layout(margin={"t": 36}, coloraxis={"colorscale": SHARE, "cmin": 0, "cmax": top,
                                                      "colorbar": colourbar(f"attention (≥ {top:.2f} alike)")})
    return figure


def flow_curves(summary: xr.Dataset, query_role: str, key_role: str, *, over_chance: bool) -> go.Figure:
    """Attention of one role to the other at each depth: a line per head and their mean, from `attention_summary`."""
    name = "flow_over_chance" if over_chance else "flow"
    flow = summary[name].sel(query_role=query_role, key_role=key_role).transpose("head", "depth").values
    text = f"attention of {query_role} to {key_role}"
    figure = _per_head(flow, summary, f"{text}<br>over chance [1]" if over_chance else f"{text} [probability]")
    if over_chance:
        figure.add_hline(y=1, line={"color": FAINT, "dash": "dot", "width": 1.2}, annotation_text="chance",
                         annotation_position="bottom right", annotation_font={"size": 11, "color": FAINT})
    return figure


def summary_curves(values: xr.DataArray) -> go.Figure:
    """One number per head at each depth: values over (depth, head)."""
    return _per_head(values.transpose("head", "depth").values, values,
                     f"{values.attrs['long_name']} [{values.attrs['units']}]")


def _per_head(values: Float[np.ndarray, "head depth"], axes: xr.Dataset | xr.DataArray, title: str) -> go.Figure:
    figure = go.Figure()
    places = depth_names(axes.layer.values, axes.loop.values)
    x = np.arange(values.shape[1])
    for h, line in enumerate(values):
        figure.add_trace(go.Scatter(x=x, y=line, name=f"head {h}", mode="lines+markers", text=places,
                                    line={"width": 1.4, "color": CATEGORIES[h % len(CATEGORIES)]}, marker={"size": 5},
                                    hovertemplate=f"%{{text}}<br>head {h}: %{{y:.3f}}<extra></extra>"))
    figure.add_trace(go.Scatter(x=x, y=values.mean(0), name="mean", mode="lines",
                                line={"width": 3, "color": INK}, text=places,
                                hovertemplate="%{text}<br>mean: %{y:.3f}<extra></extra>"))
    styled(figure, height=380)
    depth_axis(figure, axes.layer.values, axes.loop.values)
    figure.update_shapes(line={"color": DIVIDER, "width": 1})
    figure.update_yaxes(title_text=title)
    figure.update_layout(margin={"t": 96, "l": 80}, legend={"y": 1, "yref": "container", "yanchor": "top"})
    return figure
