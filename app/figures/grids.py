"""Token grids: a sequence in its two dimensions, as small multiples, and as something to click on.

Two tokens are drawn dark and light; larger vocabularies get the token's name in each cell. A sequence without
two dimensions of its own is broken into lines, like text on a page.

    figure = token_grids([Panel("truth", tokens), Panel("loop 3", predicted, wrong=predicted != tokens)], look)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int
from plotly.subplots import make_subplots

from app.figures.style import colourbar, corner_marks, key, styled
from studies.palette import FAINT, ORANGE, RULE, SHARE, SKY, VERMILLION
from studies.tasks import Task

LIGHT, DARK, MASK = "#F2EBDD", "#3B4A5E", "#BCC5D0"
LONGEST = 6                     # letters of a token's name that a cell shows
LINE, LINE_OF_WORDS = 12, 8     # most cells in a line


@dataclass(frozen=True)
class Look:
    """How a task's sequences are drawn."""

    task_shape: tuple[int, int]         # rows, columns; one row is a line of tokens
    token_names: Sequence[str]          # by token id, the mask last
    position_names: Sequence[str]

    @classmethod
    def of(cls, task: Task) -> Look:
        return cls(task.grid_shape, task.token_names(), task.position_names())

    @property
    def is_line(self) -> bool:
        return self.task_shape[0] == 1

    @property
    def letters(self) -> int:
        """The most letters that a cell shows; 0 where the colour says the token."""
        return 0 if self.binary else min(max(len(name) for name in self.token_names), LONGEST)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) as drawn; the last row of a broken line may be short."""
        if not self.is_line:
            return self.task_shape
        rows = -(-self.task_shape[1] // (LINE if self.letters <= 2 else LINE_OF_WORDS))
        return rows, -(-self.task_shape[1] // rows)

    @property
    def axis_titles(self) -> tuple[str, str]:
        """Of x and y."""
        return ("positions, line by line", "") if self.is_line else ("column", "row")

    @property
    def mask(self) -> int:
        return len(self.token_names) - 1

    @property
    def binary(self) -> bool:
        return self.mask == 2

    def grid(self, values: Sequence[object] | np.ndarray, empty: object) -> np.ndarray:
        """``values`` by row and column, with ``empty`` where the last row has no position."""
        values = np.asarray(values)
        full = np.full(self.shape[0] * self.shape[1], empty, dtype=np.result_type(values, type(empty)))
        full[:len(values)] = values
        return full.reshape(self.shape)

    def names(self, tokens: Int[np.ndarray, "pos"]) -> np.ndarray:
        """What cells say: names, cut to what fits; the whole name is in the hover text."""
        short = [name if len(name) <= LONGEST else name[:LONGEST - 1] + "…" for name in self.token_names]
        return np.asarray(short, dtype=object)[tokens]


@dataclass(frozen=True)
class Panel:
    """One grid of tokens."""

    title: str
    tokens: Int[np.ndarray, "pos"]
    wrong: Bool[np.ndarray, "pos"] | None = None       # marked in a corner
    marked: Bool[np.ndarray, "pos"] | None = None      # ringed: just revealed


def token_grids(panels: Sequence[Panel], look: Look, *, columns: int = 6, cell: int = 15,
                width: int = 640) -> go.Figure:
    """Small multiples of token grids, errors marked in a corner of their cell, cells of note ringed.

    At most ``columns`` beside each other, and no more than can be read in ``width`` pixels.
    """
    columns = min(columns, len(panels), max(1, width // (look.shape[1] * (6 * look.letters + 4) + 16)))
    n_rows = -(-len(panels) // columns)
    size = min(cell, 13) if look.letters > 2 else cell  # of marks
    height_px = look.shape[0] * cell
    gap = 20 + 14 * max(1 + panel.title.count("<br>") for panel in panels)   # between rows of panels, for titles
    total = n_rows * (height_px + gap) + 74
    figure = make_subplots(n_rows, columns, subplot_titles=[panel.title for panel in panels],
                           horizontal_spacing=0.14 / columns if columns > 1 else 0,
                           vertical_spacing=gap / max(total - 56 - gap, 1) if n_rows > 1 else 0)
    for i, panel in enumerate(panels):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        figure.add_trace(_cells(panel.tokens, look), **place)
        if panel.wrong is not None and panel.wrong.any():
            y, x = np.nonzero(look.grid(panel.wrong, False))
            across = max(cell, 6 * look.letters + 4)   # about as wide as a cell is drawn
            figure.add_trace(corner_marks(x, y, name="wrong", colour=VERMILLION,
                                          share=(0.45 * cell / across, 0.45)), **place)
        if panel.marked is not None and panel.marked.any():
            y, x = np.nonzero(look.grid(panel.marked, False))
            beside = 0.0 if look.letters <= 2 else -0.4   # the word, not over it
            figure.add_trace(go.Scatter(x=x + beside, y=y, mode="markers", showlegend=False, hoverinfo="skip",
                                        name="revealed at this step",
                                        marker={"symbol": "square-open", "size": 0.62 * size, "color": ORANGE,
                                                "line": {"width": 2.5, "color": ORANGE}}), **place)
    for j in range(len(panels), n_rows * columns):
        figure.update_xaxes(visible=False, row=j // columns + 1, col=j % columns + 1)
        figure.update_yaxes(visible=False, row=j // columns + 1, col=j % columns + 1)
    _legend(figure, look, wrong=any(p.wrong is not None for p in panels),
            marked=any(p.marked is not None for p in panels))
    styled(figure, height=total)
    figure.update_annotations(font={"size": 12, "color": FAINT})
    _board_axes(figure, look, n_rows)
    figure.update_layout(margin={"l": 36, "r": 8, "t": 30 + gap, "b": 30},
                         legend={"y": 1, "yref": "container", "yanchor": "top"})
    return figure


def mask_editor(tokens: Int[np.ndarray, "pos"], hidden: Bool[np.ndarray, "pos"], free: Bool[np.ndarray, "pos"],
                look: Look, *, cell: int = 26) -> go.Figure:
    """The example as a board of cells to click or to box: point i of the first trace is position i."""
    rows, columns = look.shape
    across = max(cell, 6 * look.letters + 6)
    y, x = np.divmod(np.arange(len(tokens)), columns)
    shown = np.where(hidden, look.mask, tokens)
    colours = [MASK if h else _colour(int(token), look) for token, h in zip(tokens, hidden, strict=True)]
    state = np.where(~free, "given, always visible",
                     np.where(hidden, "masked; click to show", "visible; click to mask"))
    names = [look.token_names[int(token)] for token in shown]
    figure = go.Figure(go.Scatter(
        x=x, y=y, mode="markers" if look.binary else "markers+text", text=look.names(shown),
        customdata=np.stack([look.position_names, state, names], -1), showlegend=False,
        hovertemplate="%{customdata[0]}<br>token %{customdata[2]}<br>%{customdata[1]}<extra></extra>",
        marker={"symbol": "square", "size": cell - 4, "color": colours, "opacity": 1,
                "line": {"width": np.where(free, 1, 3), "color": np.where(free, RULE, SKY)}},
        selected={"marker": {"opacity": 1}}, unselected={"marker": {"opacity": 1}}))
    _legend(figure, look)
    figure.add_trace(key("given", "square-open", SKY))
    styled(figure, height=rows * cell + 92)
    figure.update_xaxes(range=[-0.6, columns - 0.4], fixedrange=True, showgrid=False, zeroline=False,
                        showticklabels=False)
    figure.update_yaxes(range=[rows - 0.4, -0.6], fixedrange=True, showgrid=False, zeroline=False, showticklabels=False)
    _board_titles(figure, look)
    figure.update_layout(margin={"l": 32, "r": 8, "t": 44, "b": 32}, dragmode="pan",
                         width=columns * across + 44)
    return figure


def value_grids(values: Sequence[Float[np.ndarray, "pos"]], titles: Sequence[str], look: Look, *, bar: str,
                zmax: float, marked: int | None = None, columns: int = 6, cell: int = 15) -> go.Figure:
    """Small multiples of an amount per position, on one sequential scale from 0; ``marked`` is a position to ring."""
    columns = min(columns, len(values))
    n_rows = -(-len(values) // columns)
    total = n_rows * (look.shape[0] * cell + 34) + 60
    figure = make_subplots(n_rows, columns, subplot_titles=list(titles),
                           horizontal_spacing=0.14 / columns if columns > 1 else 0,
                           vertical_spacing=34 / max(total - 76, 1) if n_rows > 1 else 0)
    names = look.grid(np.asarray(look.position_names, dtype=object), "")
    for i, value in enumerate(values):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        figure.add_trace(go.Heatmap(z=look.grid(value, np.nan), customdata=names, coloraxis="coloraxis", xgap=1,
                                    ygap=1, hoverongaps=False,
                                    hovertemplate=f"%{{customdata}}<br>{bar} %{{z:.3f}}<extra>{titles[i]}</extra>"),
                                    **place)
        if marked is not None:
            y, x = divmod(marked, look.shape[1])
            figure.add_trace(go.Scatter(x=[x], y=[y], mode="markers", hoverinfo="skip", showlegend=False,
                                        marker={"symbol": "square-open", "size": cell - 2, "color": VERMILLION,
                                                "line": {"width": 2.5}}), **place)
    if marked is not None:
        figure.add_trace(key("the query", "square-open", VERMILLION))
    styled(figure, height=total, legend=marked is not None)
    figure.update_annotations(font={"size": 12, "color": FAINT})
    _board_axes(figure, look, n_rows)
    figure.update_layout(margin={"l": 36, "r": 8, "t": 50, "b": 30},
                         legend={"y": 1, "yref": "container", "yanchor": "top"},
                         plot_bgcolor=RULE,
                         coloraxis={"colorscale": SHARE, "cmin": 0, "cmax": zmax, "colorbar": colourbar(bar)})
    return figure


# ---------------------------------------------------------------------- private

def _board_axes(figure: go.Figure, look: Look, n_rows: int) -> None:
    """Every panel shows the whole board, first row on top, without tick labels."""
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False, range=[-0.5, look.shape[1] - 0.5])
    figure.update_yaxes(showticklabels=False, showgrid=False, zeroline=False, range=[look.shape[0] - 0.5, -0.5])
    _board_titles(figure, look, row=n_rows)


def _board_titles(figure: go.Figure, look: Look, row: int | None = None) -> None:
    """Axis titles of the last row's panels (for lines, of its first) and of the first column's."""
    style = {"title_font_size": 11, "title_standoff": 2}
    across, down = look.axis_titles
    only_first = look.is_line and row is not None   # the words for lines are longer than a small panel is wide
    figure.update_xaxes(title_text=across, **style, row=row, col=1 if only_first else None)
    figure.update_yaxes(title_text=down, **style, col=None if row is None else 1)


def _colour(token: int, look: Look) -> str:
    return (LIGHT, DARK, MASK)[token] if look.binary else MASK if token == look.mask else LIGHT


def _cells(tokens: np.ndarray, look: Look) -> go.Heatmap:
    """One grid; the colour says the token in a binary vocabulary, the text does otherwise."""
    colours = tokens if look.binary else np.where(tokens == look.mask, 2, 0)
    full = np.asarray(look.token_names, dtype=object)[tokens]
    about = np.stack([look.grid(np.asarray(look.position_names, dtype=object), ""), look.grid(full, "")], -1)
    scale = [[0, LIGHT], [1 / 3, LIGHT], [1 / 3, DARK], [2 / 3, DARK], [2 / 3, MASK], [1, MASK]]
    return go.Heatmap(z=look.grid(colours, np.nan), zmin=-0.5, zmax=2.5, colorscale=scale, showscale=False, xgap=1,
                      ygap=1, text=look.grid(look.names(tokens), ""), texttemplate="" if look.binary else "%{text}",
                      customdata=about, hoverongaps=False,
                      hovertemplate="%{customdata[0]}<br>token %{customdata[1]}<extra></extra>")


def _legend(figure: go.Figure, look: Look, *, wrong: bool = False, marked: bool = False) -> None:
    if look.binary:
        for token in (0, 1):
            figure.add_trace(key(look.token_names[token], "square", _colour(token, look)))
    figure.add_trace(key("masked", "square", MASK))
    if wrong:
        figure.add_trace(key("wrong", "triangle-ne", VERMILLION))
    if marked:
        figure.add_trace(key("revealed at this step", "square-open", ORANGE))
