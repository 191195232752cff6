"""What all figures of the explorer share: one template, and the axis of depth. Colours are in `studies.palette`.

    figure = styled(go.Figure(), height=400)
    depth_axis(figure, dataset.layer.values, dataset.loop.values)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from studies.palette import AMOUNT, BLUE, CATEGORIES, FAINT, GRID, INK, RULE

_FONT = {"family": "Inter, 'Source Sans Pro', 'Source Sans', system-ui, sans-serif", "size": 13, "color": INK}


def styled(figure: go.Figure, *, height: int, legend: bool = True) -> go.Figure:
    """The common template. White paper, so that an exported figure reads as it does on the page."""
    figure.update_layout(
        template="plotly_white", height=height, font=_FONT, paper_bgcolor="white", plot_bgcolor="white",
        margin={"l": 64, "r": 24, "t": 48, "b": 44}, showlegend=legend, hoverlabel={"font": {"size": 12}},
        colorway=list(CATEGORIES), legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0,
                                           "xanchor": "left"})
    figure.update_xaxes(linecolor=RULE, gridcolor=GRID, zerolinecolor=RULE, title_font_size=13, title_standoff=8)
    figure.update_yaxes(linecolor=RULE, gridcolor=GRID, zerolinecolor=RULE, title_font_size=13, title_standoff=8)
    return figure


def colourbar(title: str, **options: object) -> dict[str, object]:
    """A slim colour bar with its title on its side."""
    return {"title": {"text": title, "side": "right", "font": {"size": 12}}, "tickfont": {"size": 11}, "thickness": 12,
            "outlinewidth": 0, "len": 1.0, **options}


def corner_marks(x: Sequence[int] | np.ndarray, y: Sequence[int] | np.ndarray, *, name: str, colour: str,
                 share: tuple[float, float]) -> go.Scatter:
    """Filled corners, top right, of the cells (x, y) of a grid whose rows go down: what a cell says stays readable.

    ``share`` of a cell's width and height that a corner takes.
    """
    across, down = share
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    gap = np.full(len(x), np.nan)
    right, top = x + 0.46, y - 0.46
    outline_x = np.stack([right - across, right, right, right - across, gap], -1).ravel()
    outline_y = np.stack([top, top, top + down, top, gap], -1).ravel()
    return go.Scatter(x=outline_x, y=outline_y, mode="lines", fill="toself", fillcolor=colour, name=name,
                      line={"color": "white", "width": 1.2}, hoverinfo="skip", showlegend=False)


def key(name: str, symbol: str, colour: str) -> go.Scatter:
    """A legend entry that draws nothing."""
    filled = not symbol.endswith(("-open", "-thin"))
    return go.Scatter(x=[None], y=[None], mode="markers", name=name, hoverinfo="skip",
                      marker={"symbol": symbol, "size": 11, "color": colour,
                              "line": {"width": 1 if filled else 2.5, "color": RULE if filled else colour}})


def ramp(n: int, scale: str = AMOUNT) -> list[str]:
    """``n`` colours along a sequential scale, its palest end left out so that lines show on white."""
    if n == 1:
        return [BLUE]
    return list(sample_colorscale(scale, list(np.linspace(0.0, 0.88, n))))


def region_ticks(regions: np.ndarray, pixels: int) -> tuple[list[int], dict[str, list[Any]]]:
    """Where runs of equal regions start along an axis of positions, and ticks at their middles that say which.

    Runs too short for a label of their own in ``pixels`` of axis go without.
    """
    starts = [i for i in range(len(regions)) if i == 0 or regions[i] != regions[i - 1]]
    shown: dict[float, str] = {}
    last = -np.inf
    for start, end in zip(starts, [*starts[1:], len(regions)], strict=True):
        middle = (start + end - 1) / 2
        if middle - last >= 12 * len(regions) / pixels:
            shown[middle], last = str(regions[start]), middle
    return starts, {"tickvals": list(shown), "ticktext": list(shown.values())}


def depth_axis(figure: go.Figure, layer: Sequence[int] | np.ndarray, loop: Sequence[int] | np.ndarray,
               **subplot: int) -> go.Figure:
    """Label an x axis of unrolled depths 0, 1, …: layers below, loops above, lines between loops.

    ``loop`` is −1 where a layer runs once; what comes before the loops is called head, after them tail.
    """
    layer, loop = np.asarray(layer), np.asarray(loop)
    n = len(layer)
    every = 1 if n <= 36 else 2
    figure.update_xaxes(tickvals=list(range(0, n, every)), ticktext=[str(k) for k in layer[::every]],
                        title_text="layer",
                        showgrid=False, zeroline=False, tickangle=0, range=[-0.5, n - 0.5], **subplot)
    names = _stretch_names(loop)
    starts = [i for i in range(n) if i == 0 or names[i] != names[i - 1]]
    thin = 1 if len(starts) <= 14 else 2 if len(starts) <= 20 else 3
    for count, (start, end) in enumerate(zip(starts, [*starts[1:], n], strict=True)):
        if start:
            figure.add_vline(x=start - 0.5, line={"color": "white", "width": 2}, **subplot)
        looped = names[start] not in ("head", "tail")
        if looped and (count - 1) % thin:
            continue
        text = names[start] if not looped or len(starts) <= 12 else names[start].removeprefix("loop ")
        figure.add_annotation(x=(start + end - 1) / 2, y=1, yref="y domain" if subplot else "paper", text=text,
                              showarrow=False, yanchor="bottom", font={"size": 11, "color": FAINT}, **subplot)
    return figure


def depth_names(layer: Sequence[int] | np.ndarray, loop: Sequence[int] | np.ndarray) -> list[str]:
    """"layer 1, loop 3", or "layer 0 (head)"."""
    return [f"layer {a}, {name}" if name.startswith("loop") else f"layer {a} ({name})"
            for a, name in zip(layer, _stretch_names(np.asarray(loop)), strict=True)]


def _stretch_names(loop: np.ndarray) -> list[str]:
    seen_loop = False
    names = []
    for k in loop.tolist():
        seen_loop = seen_loop or k >= 0
        names.append(f"loop {k}" if k >= 0 else "tail" if seen_loop else "head")
    return names
