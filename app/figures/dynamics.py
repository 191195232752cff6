"""Figures of movement: trajectories in PCA space, curves over loops, and where states still move.

    figure = trajectories(pca.isel(batch=0), regions, "row", positions=[12, 13], layer=2)
    figure = over_loops(moves.step_relative.isel(batch=0), masked)
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Bool, Int
from plotly.subplots import make_subplots

from app.figures.grids import Look
from app.figures.style import colourbar, key, ramp, region_ticks, styled
from probes.geometry import LAWS
from studies.palette import AMOUNT, CATEGORIES, FAINT, GREEN, ORANGE, SKY, VERMILLION

CLASS_COLOURS = {"state_settled": GREEN, "direction_settled": SKY, "cyclic": ORANGE, "drifting": VERMILLION}


def trajectories(pca: xr.Dataset, regions: Int[np.ndarray, "pos"], region_name: str, *, positions: list[int],
                 layer: int | None, components: tuple[int, int] = (0, 1)) -> go.Figure:
    """The path of each position through PCA space, from loop to loop: pca over (depth, pos, component).

    ``layer`` keeps one looped layer, so that a path is that layer's state over loops; None follows the state
    through every layer, head and tail too. A ring marks the start, a disc the end of a path.
    """
    steps = np.arange(pca.sizes["depth"]) if layer is None else np.nonzero(pca.layer.values == layer)[0]
    xy = pca.coordinates.transpose("depth", "pos", "component").values[steps][:, :, list(components)]
    loop = pca.loop.values[steps]
    wanted = [r for r in np.unique(regions) if any(regions[p] == r for p in positions)]
    figure = go.Figure()
    for r, colour in zip(wanted, ramp(len(wanted)), strict=True):
        here = [p for p in positions if regions[p] == r]
        x, y = (_with_gaps(xy[:, here, i]) for i in (0, 1))
        text = [f"loop {k}" if k >= 0 else "run once" for k in loop]
        hover = [t for p in here for t in [*(f"position {p}, {label}" for label in text), ""]]
        group = {"legendgroup": str(r), "name": f"{region_name} {r}"}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", text=hover, hovertemplate="%{text}<extra></extra>",
                                    line={"color": colour, "width": 1.2}, marker={"size": 3.5}, opacity=0.75, **group))
        for at, symbol in ((0, "circle-open"), (-1, "circle")):
            figure.add_trace(go.Scatter(x=xy[at, here, 0], y=xy[at, here, 1], mode="markers", showlegend=False,
                                        hoverinfo="skip", marker={"symbol": symbol, "size": 8, "color": colour,
                                                                  "line": {"width": 1.5, "color": colour}}, **group))
    figure.add_trace(key("start", "circle-open", FAINT))
    figure.add_trace(key("end", "circle", FAINT))
    styled(figure, height=520)
    share = 100 * pca.explained_variance_ratio.values
    a, b = components
    figure.update_xaxes(title_text=f"principal component {a + 1} ({share[a]:.0f}% of the variance)")
    figure.update_yaxes(title_text=f"principal component {b + 1} ({share[b]:.0f}% of the variance)")
    return figure


def over_loops(values: xr.DataArray, where: Bool[np.ndarray, "pos"], *, log: bool = False,
               zero: bool = False, limits: tuple[float, float] | None = None) -> go.Figure:
    """A quantity over loops, a line per looped layer: median over positions, band from 10th to 90th percentile.

    ``values`` over (loop, layer, pos); ``zero`` draws the line at 0 where it means something.
    """
    figure = go.Figure()
    loops = values.loop.values
    for i, layer in enumerate(values.layer.values):
        v = values.sel(layer=layer).transpose("loop", "pos").values[:, where]
        defined = np.isfinite(v).any(1)
        low, mid, high = np.nanquantile(v[defined], [0.1, 0.5, 0.9], axis=1)
        x, colour = loops[defined], CATEGORIES[i % len(CATEGORIES)]
        figure.add_trace(go.Scatter(x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", mode="lines",
                                    hoverinfo="skip",
                                    line={"width": 0, "color": colour}, fillcolor=_faint(colour), showlegend=i == 0,
                                    name="10th to 90th percentile of positions", legendgroup="band"))
        figure.add_trace(go.Scatter(x=x, y=mid, mode="lines+markers", name=f"layer {layer}, median",
                                    line={"color": colour, "width": 2.2},
                                    hovertemplate=f"layer {layer}, loop %{{x}}<br>%{{y:.4g}}<extra></extra>"))
    if zero:
        figure.add_hline(y=0, line={"color": FAINT, "width": 1, "dash": "dot"})
    styled(figure, height=360)
    figure.update_layout(margin={"t": 74}, legend={"y": 1, "yref": "container", "yanchor": "top"})
    unit = str(values.attrs["units"])
    figure.update_xaxes(title_text="loop", dtick=1 if len(loops) <= 16 else 2, range=[loops[0] - 0.3, loops[-1] + 0.3])
    figure.update_yaxes(title_text=f"{values.attrs['long_name']} [{unit}]", range=limits)
    if log:
        ticks = [m * 10.0 ** e for e in range(-8, 4) for m in (1, 2, 5)]
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def distance_grid(distance: xr.DataArray, regions: Int[np.ndarray, "pos"], region_name: str,
                  names: list[str]) -> go.Figure:
    """Distance to the fixed point of every position after every loop, on a logarithmic scale: (loop, pos)."""
    values = distance.transpose("pos", "loop").values
    z = np.log10(np.maximum(values, 1e-6))
    low, high = max(-6, int(np.floor(z.min()))), max(0, int(np.ceil(z.max() - 0.3)))
    ticks = list(range(low, high + 1))
    figure = go.Figure(go.Heatmap(
        z=z, x=distance.loop.values, zmin=low, zmax=high, colorscale=AMOUNT, xgap=1,
        customdata=np.repeat(np.asarray(names, dtype=object)[:, None], z.shape[1], 1), text=values,
        hovertemplate="%{customdata}<br>loop %{x}<br>distance %{text:.2e}<extra></extra>",
        colorbar=colourbar("relative distance [1]", tickvals=ticks,
                           ticktext=[f"{10.0 ** k:g}" for k in ticks])))
    styled(figure, height=460, legend=False)
    starts, labels = region_ticks(regions, pixels=390)
    figure.update_yaxes(range=[len(regions) - 0.5, -0.5], **labels,
                        title_text=f"{region_name} (positions in order)", showgrid=False)
    for a in starts[1:]:
        figure.add_hline(y=a - 0.5, line={"color": "white", "width": 1.5})
    figure.update_xaxes(title_text="loop", dtick=1 if len(distance.loop) <= 16 else 2, showgrid=False)
    figure.update_layout(margin={"t": 24})
    return figure


def class_grid(classes: xr.DataArray, look: Look) -> go.Figure:
    """Fixed-point class of every position, one grid per looped layer: classes over (layer, pos)."""
    flags = str(classes.attrs["flag_meanings"]).split()
    colours, n = [CLASS_COLOURS[flag] for flag in flags], len(flags)
    names = [flag.replace("_", " ") for flag in flags]
    scale = [[edge, colours[i]] for i in range(n) for edge in (i / n, (i + 1) / n)]
    layers = classes.layer.values
    figure = make_subplots(1, len(layers), subplot_titles=[f"layer {layer}" for layer in layers],
                           horizontal_spacing=0.06)
    for i, layer in enumerate(layers):
        chosen = classes.sel(layer=layer).values
        figure.add_trace(go.Heatmap(z=look.grid(chosen, np.nan), zmin=-0.5, zmax=n - 0.5, colorscale=scale,
                                    showscale=False, xgap=1, ygap=1, hoverongaps=False,
                                    text=look.grid(np.asarray(names, dtype=object)[chosen], ""),
                                    customdata=look.grid(np.asarray(look.position_names, dtype=object), ""),
                                    hovertemplate="%{customdata}<br>%{text}<extra></extra>"), row=1, col=i + 1)
    for name, colour in zip(reversed(names), reversed(colours), strict=True):
        figure.add_trace(key(name, "square", colour))
    styled(figure, height=22 * look.shape[0] + 120)
    across, down = look.axis_titles
    figure.update_xaxes(title_text=across, showticklabels=False, showgrid=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, showgrid=False, zeroline=False, autorange="reversed")
    figure.update_yaxes(title_text=down, col=1)
    figure.update_layout(margin={"t": 66, "l": 36, "b": 36}, legend={"y": 1, "yref": "container", "yanchor": "top"})
    return figure


def settling_words(found: xr.Dataset) -> str:
    """Do states come to rest, do they grow, and how does the direction settle? ``found`` over (pos), of one layer.

    It holds what `probes.classify_tokens` and `probes.contraction` of the direction's distance say.
    """
    n, steady = found.sizes["pos"], found.grows_steadily.values.astype(bool)
    told = []
    if steady.any():
        where = f"all {n} positions" if steady.all() else f"{steady.sum()} of {n} positions"
        told.append(f"No fixed point at {where}: the state grows by {np.median(found.growth.values[steady]):.3g} per "
                    "loop (median), so that only its direction can settle.")
    law = found.law.values
    for name, slope, what in (("power", "power", "a power law of the loop's number with exponent {:.2f}"),
                              ("exponential", "exponential", "an exponential, by a factor of {:.2f} per loop")):
        here = law == LAWS.index(name)
        if here.any():
            value = float(np.median(found[slope].values[here]))
            r2, other = (float(np.median(found[f"{of}_r2"].values[here])) for of in
                         (name, "exponential" if name == "power" else "power"))
            told.append(f"At {here.sum()} of {n} positions the direction's distance is fitted best by "
                        f"{what.format(value if name == 'power' else np.exp(value))} (R² {r2:.3f}; the other law "
                        f"{other:.3f}; medians).")
    rest = int((law < LAWS.index("exponential")).sum())
    if rest:
        told.append(f"At {rest} of {n} it does not change, or too few loops are above rounding to fit a law.")
    return " ".join(told)


# ---------------------------------------------------------------------- private

def _with_gaps(paths: np.ndarray) -> list[float | None]:
    """[step, path] as one line per path, with a gap between any two."""
    return [v for path in paths.T.tolist() for v in [*path, None]]


def _faint(colour: str) -> str:
    r, g, b = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r}, {g}, {b}, 0.13)"
