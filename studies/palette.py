"""The colours of all figures, those of the studies and those of the explorer, and how a study's figure is laid out.

Colours are safe for colour-blind readers: Okabe and Ito's eight for categories, viridis and blues for amounts,
blue–white–red around a zero that means something. A kind of model has the same colour everywhere.

    figure.add_scatter(x=loops, y=accuracy, line={"color": KIND_COLOURS["loop"]})
    laid_out(figure, "loops S in one forward", "share right", y_range=[0, 1])
"""

from __future__ import annotations

import plotly.graph_objects as go

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
BLACK, SLATE = "#000000", "#5D6D7E"
CATEGORIES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, SLATE, BLACK)
INK, FAINT, RULE = "#1F2933", "#52606D", "#D9DEE5"
"""Text, text of less weight, and lines that divide."""
GRID, DIVIDER = "#EEF1F5", "#E4E8EE"
"""Grid lines, and lines between loops over a white ground."""
CURRENT = "#E6EDF5"
"""Ground of what is chosen."""
UNASKED = "#D0D0D0"
"""Positions that the model was not asked about: no colour of any scale."""
NEUTRAL = "#7F8C99"
"""What is there for comparison: untrained models, thresholds, a single loop."""

KIND_COLOURS = {"loop": BLUE, "twin": GREEN, "deep": VERMILLION, "control": VERMILLION, "untrained": NEUTRAL}
"""By kind of model; "control" is the deep twin cut into pseudo-loops."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Lines of one colour: one per seed, or per variant."""

AMOUNT = "Viridis"          # from little to much
AMOUNT_REVERSED = "Viridis_r"
DISTANCE = "Cividis"
SHARE = "Blues"             # attention: nothing is white, so that the paper shows through
AROUND_ZERO = "RdBu_r"      # blue below a meaningful zero, red above


def laid_out(figure: go.Figure, x: str, y: str, *, y_range: list[float] | None = None, log_y: bool = False,
             width: int | None = None, height: int = 380) -> go.Figure:
    """A study's figure with axis titles ("" leaves an axis as it is) and its legend above; returns it."""
    figure.update_layout(template="plotly_white", width=width, height=height,
                         margin={"l": 70, "r": 30, "t": 50, "b": 60}, legend={"orientation": "h", "y": 1.13, "x": 0})
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y, range=y_range, type="log" if log_y else None)
    return figure
