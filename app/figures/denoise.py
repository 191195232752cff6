"""Figures of the sampler: what it costs and how far it is, step by step.

    figure = step_costs(trace, progress, current=3, max_loops=8)     # trace as compute.trace_of returns it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from app.figures.style import colourbar, region_ticks, styled
from studies.palette import AMOUNT, BLUE, CURRENT, GREEN, ORANGE, RULE

Trace = Sequence[Mapping[str, np.ndarray]]


def step_costs(trace: Trace, progress: Mapping[str, Float[np.ndarray, "step"]], *, current: int,
               max_loops: int) -> go.Figure:
    """Loops used at each denoising step, above the shares of free positions revealed and right so far."""
    steps = np.arange(len(trace))
    loops = [float(step["loops_used"].mean()) for step in trace]
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.09, row_heights=[0.5, 0.5])
    figure.add_trace(go.Bar(x=steps, y=loops, name="loops used", marker={"color": BLUE},
                            hovertemplate="step %{x}: %{y:.0f} loops<extra></extra>"), row=1, col=1)
    figure.add_hline(y=max_loops, line={"color": RULE, "dash": "dash"}, annotation_text=f"at most {max_loops}",
                     annotation_position="top right", annotation_font={"size": 11}, row=1, col=1)
    for (name, values), (colour, width) in zip(progress.items(), ((ORANGE, 6), (GREEN, 2)), strict=True):
        figure.add_trace(go.Scatter(x=steps, y=values, name=name, mode="lines+markers",
                                    line={"color": colour, "width": width}, hovertemplate=f"step %{{x}}: {name} "
                                                                                          f"%{{y:.1%}}<extra></extra>"),
                                                                                          row=2, col=1)
    figure.add_vrect(x0=current - 0.5, x1=current + 0.5, fillcolor=CURRENT, layer="below", line_width=0)
    styled(figure, height=380)
    figure.update_xaxes(title_text="denoising step", row=2, col=1)
    figure.update_xaxes(tickvals=list(steps) if len(steps) <= 24 else None, range=[-0.6, len(steps) - 0.4],
                        showgrid=False,
                        zeroline=False)
    figure.update_yaxes(title_text="loops", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="share of free positions", range=[-0.03, 1.05], tickformat=".0%", row=2, col=1)
    return figure


def loop_changes(trace: Trace, *, current: int) -> go.Figure:
    """How far each loop of each denoising step moved the state; empty where a loop did not run, and for the first."""
    longest = max(len(step["change"]) for step in trace)
    z = np.stack([np.pad(step["change"].astype(float), (0, longest - len(step["change"])), constant_values=np.nan)
                  for step in trace], 1)[1:]                      # [loop, step]
    figure = go.Figure(go.Heatmap(
        z=z, y=np.arange(1, longest), zmin=0, colorscale=AMOUNT, xgap=1, ygap=1, hoverongaps=False,
        hovertemplate="step %{x}, loop %{y}<br>relative change %{z:.3f}<extra></extra>",
        colorbar=colourbar("relative change of the state")))
    figure.add_vrect(x0=current - 0.5, x1=current + 0.5, line={"color": BLUE, "width": 1.5}, fillcolor="rgba(0,0,0,0)")
    styled(figure, height=max(220, 100 + 26 * longest), legend=False)
    figure.update_yaxes(title_text="loop", dtick=1 if longest <= 17 else 4, range=[longest - 0.5, 0.5], showgrid=False,
                        zeroline=False)
    return figure.update_xaxes(title_text="denoising step", range=[-0.5, len(trace) - 0.5], showgrid=False,
                               zeroline=False, tickvals=list(range(len(trace))) if len(trace) <= 24 else None)


def confidence_grid(trace: Trace, regions: np.ndarray, region_name: str, names: Sequence[str], *, n_tokens: int,
                    current: int) -> go.Figure:
    """Probability of the drawn token at every position and step; a dot where the position was revealed."""
    z = np.stack([step["probability"][0] for step in trace], 1)
    revealed = np.stack([step["revealed"][0] for step in trace], 1)
    visible = np.stack([step["before"][0] for step in trace], 1) != n_tokens
    figure = go.Figure(go.Heatmap(
        z=np.where(visible, np.nan, z), zmin=1 / n_tokens, zmax=1, colorscale=AMOUNT, xgap=1,
        customdata=np.repeat(np.asarray(names, dtype=object)[:, None], z.shape[1], 1), hoverongaps=False,
        hovertemplate="%{customdata}<br>step %{x}<br>probability %{z:.3f}<extra></extra>",
        colorbar=colourbar("probability of the drawn token")))
    y, x = np.nonzero(revealed)
    figure.add_trace(go.Scatter(x=x, y=y, mode="markers", name="revealed here", hoverinfo="skip",
                                marker={"size": 5, "color": ORANGE, "line": {"width": 0.5, "color": "white"}}))
    figure.add_vrect(x0=current - 0.5, x1=current + 0.5, line={"color": BLUE, "width": 1.5}, fillcolor="rgba(0,0,0,0)")
    styled(figure, height=480)
    figure.update_yaxes(range=[len(regions) - 0.5, -0.5], **region_ticks(regions, pixels=388)[1],
                        title_text=f"{region_name} (positions in order)", showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="denoising step", range=[-0.5, len(trace) - 0.5], showgrid=False, zeroline=False,
                        tickvals=list(range(len(trace))) if len(trace) <= 24 else None)
    return figure
