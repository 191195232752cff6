"""The claims study's figures, one per claim: pure functions of measurements.

    drawn = figures(pooled)                               # {"a": figure, …}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from studies.palette import BLACK, KIND_COLOURS, NEUTRAL, PURPLE, laid_out
from studies.zoo import SHORT_NAMES

_panel = partial(laid_out, width=640, height=360)


def figures(pooled: Mapping[str, xr.Dataset]) -> dict[str, go.Figure]:
    """One figure per claim; thin lines are seeds, thick ones their mean."""
    loops, noise, attention = pooled["loops"], pooled["noise"], pooled["attention"]
    s_max = int(loops.n_loops.values[-1]) // 4
    drawn = {letter: go.Figure() for letter in "abcde"}
    for kind in loops.kind.values:
        _seeds(drawn["a"], pooled["training"].nelbo.sel(kind=kind), "flops", str(kind))
    _panel(drawn["a"], "training FLOPs (thick line: mean of the seeds)" if loops.sizes["seed"] > 1
           else "training FLOPs", "held-out NELBO [nat per free token]", log_y=True)
    drawn["a"].update_xaxes(exponentformat="power")
    drawn["a"].update_yaxes(dtick=1 if _decades(pooled["training"].nelbo) > 1 else None, exponentformat="power")
    for kind in loops.kind.values:
        at = loops.exact.sel(kind=kind, n_loops=s_max if kind == "loop" else 1).mean("example")
        name, colour = SHORT_NAMES[kind], KIND_COLOURS[kind]
        drawn["b"].add_bar(x=[name], y=[float(at.mean("seed"))], marker_color=colour, name=name)
        drawn["b"].add_scatter(x=[name] * at.sizes["seed"], y=at.values, mode="markers", showlegend=False,
                               marker={"color": BLACK, "size": 7, "symbol": "circle-open"})
    _panel(drawn["b"], "", "examples right (points: seeds)", y_range=[0, 1.02])
    for name, dash in (("exact", "solid"), ("cells", "dot")):
        _seeds(drawn["c"], loops[name].sel(kind="loop").mean("example"), "n_loops", "loop",
               label=f"LoopMDM, {'examples' if name == 'exact' else 'cells'} right", dash=dash)
    for kind in ("twin", "deep"):
        if kind in loops.kind:
            colour = KIND_COLOURS[kind]
            drawn["c"].add_hline(y=float(loops.exact.sel(kind=kind, n_loops=1).mean()),
                                 annotation_text=SHORT_NAMES[kind], line={"color": colour, "width": 1},
                                 annotation_font_color=colour)
    drawn["c"].add_vline(x=s_max, line={"color": NEUTRAL, "dash": "dash"}, annotation_text="S_max")
    _panel(drawn["c"], "loops S in one forward", "share right, all masked", y_range=[0, 1.02])
    _seeds(drawn["d"], noise.gain.mean("example"), "t", "loop")
    _panel(drawn["d"], "noise level t", "NLL(S = 1) − NLL(S_max) [nat per masked token]")
    _seeds(drawn["e"], attention.flow.mean("example"), "loop", "loop")
    drawn["e"].add_vline(x=s_max, line={"color": NEUTRAL, "dash": "dash"}, annotation_text="S_max")
    _panel(drawn["e"], "loop", "share of attention from masked to masked positions")
    return {**drawn, "f": _adaptive_figure(pooled["adaptive"]), "g": _sampling_figure(pooled["sampling"])}


def _adaptive_figure(data: xr.Dataset) -> go.Figure:
    figure = go.Figure()
    used = data.loops_used.mean(["seed", "example"])
    for name, label, dash in (("exact", "examples right", "solid"), ("cells", "cells right", "dot")):
        figure.add_scatter(x=used.values, y=data[name].mean(["seed", "example"]).values, name=label,
                           mode="lines+markers", line={"color": KIND_COLOURS["loop"], "dash": dash},
                           text=[f"τ = {t:g}" for t in data.threshold.values])
    return _panel(figure, "loops used on average (each point one threshold τ)", "share right", y_range=[0, 1.02])


def _sampling_figure(data: xr.Dataset) -> go.Figure:
    figure = go.Figure()
    equal = data.equal_exact.mean(["seed", "example"])
    figure.add_scatter(x=data.n_steps_of_plan.values, y=equal.values, mode="lines+markers+text",
                       textposition="top center", text=[f"S = {s}" for s in data.n_loops.values],
                       name="equal total compute", line={"color": KIND_COLOURS["loop"]})
    for row, s in enumerate(data.loops.values):
        values = data.steps_exact.isel(loops=row).mean(["seed", "example"])
        figure.add_scatter(x=data.n_steps.values, y=values.values, mode="lines+markers", name=f"S = {s}",
                           line={"dash": "dot", "color": (NEUTRAL, PURPLE)[row]})
    ticks = sorted({*data.n_steps_of_plan.values.tolist(), *data.n_steps.values.tolist()})
    _panel(figure, "denoising steps", "examples right", y_range=[0, 1.08])
    return figure.update_xaxes(type="log", tickvals=ticks, ticktext=list(map(str, ticks)))


def _seeds(figure: go.Figure, values: xr.DataArray, axis: str, kind: str, *, label: str | None = None,
           dash: str = "solid") -> None:
    """A thin line per seed, and a thick one of their mean, if any was measured; values over (seed, ``axis``)."""
    x, lines = seed_lines(values, axis)
    if not lines:
        return
    for own_x, own_y in lines if len(lines) > 1 else []:
        figure.add_scatter(x=own_x, y=own_y, mode="lines", showlegend=False, opacity=0.35,
                           line={"color": KIND_COLOURS[kind], "width": 1, "dash": dash})
    figure.add_scatter(x=x, y=np.mean([np.interp(x, own_x, own_y) for own_x, own_y in lines], axis=0),
                       mode="lines+markers", name=label or SHORT_NAMES[kind], marker={"size": 5},
                       line={"color": KIND_COLOURS[kind], "width": 2.5, "dash": dash})


def seed_lines(values: xr.DataArray, axis: str) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """(abscissae that every seed's line covers, [(x, y) of each measured seed]) of values over (seed, ``axis``).

    Seeds need not share abscissae (the FLOPs of their evaluations differ), and a mean over those that happen to have
    a value at one would jump from seed to seed: it is to be read off the lines, at the abscissae of the first.
    """
    x = values[axis].values
    rows = values.transpose("seed", axis).values
    lines = [(x[defined], row[defined]) for row, defined in zip(rows, ~np.isnan(rows), strict=True) if defined.any()]
    if not lines:
        return x[:0], []
    first, last = max(own[0] for own, _ in lines), min(own[-1] for own, _ in lines)
    shared = lines[0][0]
    return shared[(shared >= first) & (shared <= last)], lines


def _decades(values: xr.DataArray) -> float:
    """Powers of ten between the least and the largest positive value; 0 where there is none."""
    positive = values.where(values > 0)
    ratio = float(positive.max() / positive.min())
    return 0.0 if np.isnan(ratio) else float(np.log10(ratio))
