"""Figures of what a lens reads: a token × (loop, layer) grid, and curves per region.

    figure = lens_grid(lens.isel(batch=0), "nll", look, tokens=tokens, positions=range(12), region_name="row",
                       regions=regions)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Int

from app.figures.grids import Look
from app.figures.style import colourbar, corner_marks, depth_axis, depth_names, key, ramp, region_ticks, styled
from studies.palette import AMOUNT, AMOUNT_REVERSED, AROUND_ZERO, DIVIDER, FAINT, INK, SHARE, UNASKED

COLOURS = {
    "nll": "NLL of the truth",
    "probability": "probability",
    "entropy": "entropy",
    "kl_to_final": "KL to the final answer",
}
"""What the grid can be coloured by, and how a menu calls it."""

TEXT_UP_TO, TEXT_UP_TO_IN_ONE = 26, 96
"""Rows above which the predicted token is no longer written into its cell: where there are regions to choose from, and
where there is but one."""
WIDTH = 1000
"""Pixels across all depths, about as wide as a page draws them."""


def lens_grid(lens: xr.Dataset, colour: str, look: Look, *, tokens: Int[np.ndarray, "pos"], positions: Sequence[int],
              region_name: str, regions: Int[np.ndarray, "pos"]) -> go.Figure:
    """Top prediction of every chosen position at every depth of one example: lens over (depth, pos).

    Positions that were not masked have no answer to give: they are grey and show the token that stands there. Wrong
    predictions have a dark corner; hovering lists the likeliest tokens.
    """
    shown = lens.isel(pos=list(positions))
    here, asked = tokens[list(positions)][:, None], shown.scored.values[:, None]
    predicted = shown.prediction.transpose("pos", "depth").values
    few = len(positions) <= (TEXT_UP_TO if len(np.unique(regions)) > 1 else TEXT_UP_TO_IN_ONE)
    row = 22 if few else 8
    cell = WIDTH / shown.sizes["depth"]
    text = few and cell >= 6 * max(1, look.letters) + 4
    places = depth_names(lens.layer.values, lens.loop.values)
    common = {"customdata": _hover(shown, look, tokens, positions, places), "xgap": 1, "ygap": 1 if few else 0,
              "hovertemplate": "%{customdata}<extra></extra>", "hoverongaps": False, "textfont": {"size": 11},
              "texttemplate": "%{text}" if text else None}
    figure = go.Figure(go.Heatmap(
        z=np.where(asked, shown[colour].transpose("pos", "depth").values, np.nan),
        text=np.where(asked, look.names(predicted), ""), **common, **_scale(colour, lens, len(look.token_names) - 1)))
    if not asked.all():
        figure.add_trace(go.Heatmap(
            z=np.where(asked, np.nan, np.zeros(predicted.shape)), name="not asked", showscale=False,
            colorscale=[[0, UNASKED], [1, UNASKED]], zmin=0, zmax=1, **common,
            text=np.where(asked, "", look.names(np.broadcast_to(here, predicted.shape)))))
        figure.add_trace(key("not asked: visible to the model", "square", UNASKED))
    y, x = np.nonzero(asked & (predicted != here))
    figure.add_trace(corner_marks(x, y, name="prediction is wrong", colour=INK,
                                  share=(min(0.35, 9 / cell), min(0.6, 9 / row))))
    figure.add_trace(key("prediction is wrong", "triangle-ne", INK))
    styled(figure, height=max(260, row * len(positions) + 130))
    _position_axis(figure, look, positions, regions, region_name, few)
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"},
                         margin={"t": 64, "l": 124 if few else 70})
    return depth_axis(figure, lens.layer.values, lens.loop.values)


def region_curves(lens: xr.Dataset, value: str, regions: Int[np.ndarray, "pos"], region_name: str) -> go.Figure:
    """A lens value at every depth, averaged over the masked positions of each region: lens over (depth, pos)."""
    masked = lens.scored.values
    wanted = [r for r in np.unique(regions) if (masked & (regions == r)).any()]
    figure = go.Figure()
    places = depth_names(lens.layer.values, lens.loop.values)
    for r, colour in zip(wanted, ramp(len(wanted)) if wanted else [], strict=True):
        on = lens[value].values[:, masked & (regions == r)].mean(1)
        figure.add_trace(go.Scatter(x=np.arange(len(on)), y=on, name=f"{region_name} {r}", mode="lines+markers",
                                    line={"color": colour, "width": 2}, marker={"size": 5}, text=places,
                                    hovertemplate=f"%{{text}}<br>{region_name} {r}: %{{y:.3f}}<extra></extra>"))
    styled(figure, height=380)
    unit = lens[value].attrs["units"]
    figure.update_yaxes(title_text=f"{COLOURS.get(value, value)} [{unit}]", rangemode="tozero")
    figure.update_layout(margin={"t": 84}, legend={"y": 1, "yref": "container", "yanchor": "top"})
    depth_axis(figure, lens.layer.values, lens.loop.values)
    return _grey_separators(figure)


# ---------------------------------------------------------------------- private

def _scale(colour: str, lens: xr.Dataset, n_tokens: int) -> dict[str, Any]:
    """Colour scale, limits and bar: NLL diverges around a uniform guess, the rest grows from its least value."""
    guess = float(np.log(n_tokens))
    if colour == "nll":
        return {"colorscale": AROUND_ZERO, "zmin": 0, "zmid": guess, "zmax": 2 * guess,
                "colorbar": colourbar("NLL of the truth [nat]", tickvals=[0, guess, 2 * guess],
                                      ticktext=["0", f"{guess:.2f}<br>uniform<br>guess", f"≥ {2 * guess:.2f}"])}
    if colour == "probability":
        return {"colorscale": AMOUNT, "zmin": 1 / n_tokens, "zmax": 1,
                "colorbar": colourbar("probability of the prediction")}
    asked = lens[colour].where(lens.scored)
    top = guess if colour == "entropy" else float(asked.max().fillna(0).clip(1e-6))
    title = "entropy [nat]" if colour == "entropy" else "KL(final ‖ lens) [nat]"
    return {"colorscale": AMOUNT_REVERSED if colour == "entropy" else SHARE, "zmin": 0, "zmax": top,
            "colorbar": colourbar(title)}


def _hover(lens: xr.Dataset, look: Look, tokens: np.ndarray, positions: Sequence[int], places: list[str]) -> np.ndarray:
    """One text per cell: where, what is likely there, what is true."""
    names = np.asarray(look.token_names, dtype=object)
    if "top_tokens" in lens:
        ids, p = (lens[name].transpose("pos", "depth", "rank").values for name in ("top_tokens", "top_probabilities"))
    else:
        ids, p = (lens[name].transpose("pos", "depth").values[..., None] for name in ("prediction", "probability"))
    nll = lens.nll.transpose("pos", "depth").values
    masked = lens.scored.values
    text = np.empty(ids.shape[:2], dtype=object)
    for i, pos in enumerate(positions):
        role = "masked" if masked[i] else "visible"
        for d in range(ids.shape[1]):
            guesses = "  ".join(f"{names[token]} {chance:.3f}" for token,
                                chance in zip(ids[i, d], p[i, d], strict=True))
            text[i, d] = (f"{look.position_names[pos]} ({role})<br>{places[d]}<br>{guesses}<br>"
                          f"truth {names[tokens[pos]]}, NLL {nll[i, d]:.3f} nat")
    return text


def _position_axis(figure: go.Figure, look: Look, positions: Sequence[int], regions: np.ndarray, region_name: str,
                   few: bool) -> None:
    """Positions from top to bottom: each by name where there are few, otherwise by region."""
    n = len(positions)
    figure.update_yaxes(range=[n - 0.5, -0.5], showgrid=False, zeroline=False)
    if few:
        figure.update_yaxes(tickvals=list(range(n)), ticktext=[look.position_names[p] for p in positions],
                            title_text="", tickfont={"size": 11})
        return
    here = regions[list(positions)]
    starts, ticks = region_ticks(here, pixels=figure.layout.height - 130)
    figure.update_yaxes(**ticks, title_text=f"{region_name} (positions in order)")
    for a in starts[1:]:
        figure.add_hline(y=a - 0.5, line={"color": "white", "width": 1.5})


def _grey_separators(figure: go.Figure) -> go.Figure:
    """On white paper the lines between loops are grey."""
    figure.update_shapes(line={"color": DIVIDER, "width": 1})
    figure.update_annotations(font={"color": FAINT})
    figure.update_layout(font_color=INK)
    return figure
