"""Figures of linear probes: how well a latent can be read, per region and depth.

    figure = probe_grid(result, "selectivity", "row")
    figure = probe_curves(result, "accuracy", "row")
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from app.figures.style import colourbar, depth_axis, depth_names, ramp, styled
from studies.palette import AMOUNT, AROUND_ZERO, DIVIDER, FAINT

VALUES = {"accuracy": "accuracy", "selectivity": "selectivity", "control_accuracy": "accuracy on the control task"}
"""What the page can show, and how it calls it."""


def probe_grid(result: xr.Dataset, value: str, region_name: str) -> go.Figure:
    """Region × depth: accuracies from the least that guessing gets to 1, selectivity around 0."""
    z = result[value].transpose("group", "depth").values
    n_classes = int(result.attrs["n_classes"])
    if value == "selectivity":
        scale = {"colorscale": AROUND_ZERO, "zmin": -1 + 1 / n_classes, "zmid": 0, "zmax": 1 - 1 / n_classes}
    else:
        scale = {"colorscale": AMOUNT, "zmin": 1 / n_classes, "zmax": 1}
    places = depth_names(result.layer.values, result.loop.values)
    groups = [str(g) for g in result.group.values]
    figure = go.Figure(go.Heatmap(
        z=z, y=list(range(len(groups))), customdata=np.repeat(np.asarray(places, dtype=object)[None], len(z), 0),
        text=np.vectorize(lambda v: "" if np.isnan(v) else f"{v:.2f}".removeprefix("0"))(z),
        texttemplate="%{text}" if z.shape[1] <= 26 else None, textfont={"size": 10}, xgap=1, ygap=2,
        hovertemplate=f"%{{customdata}}<br>{region_name} %{{y}}: %{{z:.3f}}<extra></extra>",
        colorbar=colourbar(f"{VALUES[value]} [1]"), **scale))
    styled(figure, height=34 * len(groups) + 120, legend=False)
    figure.update_yaxes(title_text=region_name, tickvals=list(range(len(groups))), ticktext=groups, showgrid=False,
                        range=[len(groups) - 0.5, -0.5])
    return depth_axis(figure, result.layer.values, result.loop.values)


def probe_curves(result: xr.Dataset, value: str, region_name: str) -> go.Figure:
    """A line per region over depth, with 95% intervals where the value has them, and the majority baseline."""
    figure = go.Figure()
    x = np.arange(result.sizes["depth"])
    places = depth_names(result.layer.values, result.loop.values)
    for group, colour in zip(result.group.values, ramp(result.sizes["group"]), strict=True):
        y = result[value].sel(group=group).values
        error = None
        if f"{value}_low" in result:
            low, high = (result[f"{value}_{end}"].sel(group=group).values for end in ("low", "high"))
            error = {"type": "data", "symmetric": False, "array": high - y, "arrayminus": y - low, "thickness": 1,
                     "width": 2}
        figure.add_trace(go.Scatter(x=x, y=y, error_y=error, name=f"{region_name} {group}", mode="lines+markers",
                                    line={"color": colour, "width": 2}, marker={"size": 5}, text=places,
                                    hovertemplate=f"%{{text}}<br>{region_name} {group}: %{{y:.3f}}<extra></extra>"))
    base, text = (0.0, "no better than the control") if value == "selectivity" else (
        float(result.majority.mean()), "commonest label, always")
    figure.add_hline(y=base, line={"color": FAINT, "dash": "dot", "width": 1.2}, annotation_text=text,
                     annotation_position="bottom right", annotation_font={"size": 11, "color": FAINT})
    styled(figure, height=400)
    depth_axis(figure, result.layer.values, result.loop.values)
    figure.update_shapes(line={"color": DIVIDER, "width": 1}, selector={"type": "line", "xref": "x"})
    figure.update_yaxes(title_text=f"{VALUES[value]} [1]")
    figure.update_layout(margin={"t": 84}, legend={"y": 1, "yref": "container", "yanchor": "top"})
    return figure
