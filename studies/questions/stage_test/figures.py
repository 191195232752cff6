"""The study's figures: pure functions of verdicts as plain data.

    drawn = figures(verdict["found"], verdict["main"])       # {"matrices": (title, what am I looking at, figure), …}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from studies.palette import AROUND_ZERO, BLUE, FAINT, KIND_COLOURS, NEUTRAL, VERMILLION, laid_out
from studies.questions.stage_test.judge import subject_row

Drawn = dict[str, tuple[str, str, go.Figure]]
KEPT_COLOURS = {**KIND_COLOURS, "foreign": FAINT, "control": VERMILLION}


def dataset(told: Mapping[str, Any]) -> xr.Dataset:
    """The τ matrices of one subject, with loop and layer of each place, and the gains over numbers of loops."""
    verdict = told["verdict"]
    loops = _array(verdict["tau"])
    named: dict[str, Any] = {"tau": (("content", "operation"), loops, _told("τ of whole loops"))}
    if verdict["aligned"] is not None:
        named["aligned"] = (("content", "operation"), _array(verdict["aligned"]), _told("τ in a fitted basis"))
    stages = verdict["stages"]
    named["stages"] = (("content_layer", "operation_layer"), _array(stages["tau"]), _told("τ of single layers"))
    nll = {"units": "nat", "definition": "calibrated NLL per scored position", "source": "probes.gains"}
    for name in ("prefix", "repeat", "suffix", "line"):
        if name in verdict["gains"]:
            named[name] = (("loops",), _array(verdict["gains"][name]), {**nll, "long_name": f"NLL, {name}"})
    labels = [f"{layer}, loop {loop}" for loop, layer in zip(stages["loop"], stages["layer"], strict=True)]
    square = len(labels) == len(stages["tau"])
    return xr.Dataset(named, coords={"content_layer": labels, "operation_layer": labels} if square else None)


def _told(name: str) -> dict[str, str]:
    return {"long_name": name, "units": "1", "source": "ours",
            "definition": "1 − KL(exchange) ÷ KL(skip), of means over the examples of all training seeds"}


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=float)   # None becomes NaN


def figures(found: Mapping[str, Mapping[str, Any]], main: str) -> Drawn:
    """τ matrices side by side, τ of all subjects, and the curves over loops."""
    drawn: Drawn = {}
    shown = [key for key in ("AAAA-control", "ABCD-control", f"{main}-loop", f"{main}-deep") if key in found]
    if shown:
        drawn["matrices"] = (
            "Could another loop have done this loop's work?",
            "τ of each two loops: 100 is all of the work of the loop in the row, done by the operation of the loop in "
            "the column; 0 is as good as leaving it out; below 0 spoils it (cut at −100). AAAA and ABCD are blocks "
            "built to repeat one operation, or to do another one in every loop, with shared weights; the LoopMDM and "
            f"its unlooped deep twin, cut into pseudo-loops, are those of {main}.",
            matrices([(_title(found[key]), found[key]["verdict"]["tau"]) for key in shown]))
        staged = [key for key in shown if found[key]["kind"] != "control"]
        drawn["stages"] = (
            "Could another layer have done this layer's work?",
            "The same for single layers of the loops after the first, ordered by layer and then by loop: blocks along "
            "the diagonal are one layer in all loops.",
            matrices([(_title(found[key]), *_by_layer(found[key]["verdict"]["stages"])) for key in staged]))
    if any(subject_row(told)["tau"] is not None for told in found.values()):
        drawn["overview"] = (
            "How much of a loop's work another loop does",
            "Mean τ over pairs of loops after the first, weighted by work, with its 95% interval over training seeds "
            "and examples; filled where the test decided, open where it is undecided or there is nothing to explain. "
            "Above 50% counts as the same operation, below 25% as another one (grey lines). Subjects without work are "
            "left out.", overview(list(found.values())))
    curves = [key for key in shown if found[key]["kind"] != "control"]
    if curves:
        drawn["gains"] = ("What each loop adds, and its nulls",
                          "NLL per scored position after a number of loops (solid), on the straight line through the "
                          "states after loops 1 and 2 (dotted), and with loop 0 in the place of every later loop "
                          "(dashed: the model itself, where loops share weights and are not told apart).",
                          gains_figure(found, curves))
    return drawn


def matrices(shown: Sequence[tuple[Any, ...]]) -> go.Figure:
    """τ matrices side by side: (title, matrix) or (title, matrix, labels) each."""
    named = any(len(part) > 2 for part in shown)
    figure = make_subplots(1, len(shown), subplot_titles=[title for title, *_ in shown],
                           horizontal_spacing=0.14 if named else 0.06)
    for column, (_, values, *labels) in enumerate(shown, start=1):
        tau = np.clip(_array(values), -1, 1)
        names = labels[0] if labels else [str(k) for k in range(len(tau))]
        figure.add_trace(go.Heatmap(z=tau * 100, x=names, y=names, texttemplate="%{z:.0f}", coloraxis="coloraxis",
                                    textfont={"size": 11 if len(tau) <= 6 else 8}, xgap=1, ygap=1,
                                    hovertemplate="work of %{y}, done by %{x}: %{z:.0f}<extra></extra>"),
                         row=1, col=column)
        figure.update_xaxes(type="category", title_text="operation of" if column == 1 else "", showgrid=False, row=1,
                            col=column)
        figure.update_yaxes(type="category", autorange="reversed", title_text="work of" if column == 1 else "",
                            showgrid=False, row=1, col=column)
    figure.update_layout(coloraxis={"colorscale": AROUND_ZERO, "cmin": -100, "cmax": 100,
                                    "colorbar": {"title": "τ × 100", "thickness": 12}})
    laid_out(figure, "", "", width=(430 if named else 300) * len(shown) + 90, height=460 if named else 370)
    return figure.update_annotations(font_size=13).update_xaxes(tickangle=90 if named else 0)


def overview(found: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Mean τ of every subject with its interval, a row each."""
    known = sorted((told for told in found if subject_row(told)["tau"] is not None),
                   key=lambda told: list(_KINDS).index(told["kind"]))
    names = [_named(told) for told in known]
    figure = go.Figure()
    for kind in dict.fromkeys(told["kind"] for told in known):
        rows = [i for i, told in enumerate(known) if told["kind"] == kind]
        cells = [known[i]["verdict"]["table"][0] for i in rows]
        decided = [cell["regime"] not in ("undecided", "nothing") for cell in cells]
        figure.add_scatter(
            x=[100 * cell["tau"] for cell in cells], y=rows, mode="markers", name=_KINDS[kind],
            text=[f"{cell['regime']}, {cell['letters']}" for cell in cells],
            marker={"color": KEPT_COLOURS[kind], "size": 9,
                    "symbol": ["circle" if sure else "circle-open" for sure in decided]},
            error_x={"type": "data", "symmetric": False, "array": [100 * (c["tau_high"] - c["tau"]) for c in cells],
                     "arrayminus": [100 * (c["tau"] - c["tau_low"]) for c in cells]},
            hovertemplate="%{y}<br>τ %{x:.0f}%<br>%{text}<extra></extra>")
    for limit in (25, 50):
        figure.add_vline(x=limit, line={"color": NEUTRAL, "dash": "dot"})
    figure.update_yaxes(tickvals=list(range(len(known))), ticktext=names, autorange="reversed")
    laid_out(figure, "share of a loop's work that another loop does [%]", "", width=860, height=150 + 22 * len(known))
    return figure.update_layout(legend={"y": 1 + 50 / (100 + 22 * len(known))})


_KINDS = {"control": "built to run AAAA, ABCD", "loop": "LoopMDM", "deep": "unlooped deep twin",
          "foreign": "pretrained, looped by us", "untrained": "untrained"}


CURVES = (("prefix", "solid", "the model", BLUE), ("line", "dot", "straight line", FAINT),
          ("repeat", "dash", "loop 0 every time", VERMILLION))
"""Curve, dash, name and colour of what is drawn over numbers of loops."""


def gains_figure(found: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> go.Figure:
    """NLL over numbers of loops with the straight line and the depth control, a panel per subject."""
    figure = make_subplots(1, len(keys), subplot_titles=[_title(found[key]) for key in keys], shared_yaxes=True)
    for column, key in enumerate(keys, start=1):
        curves = found[key]["verdict"]["gains"]
        for name, dash, said, colour in CURVES:
            if name in curves:
                y = _array(curves[name])
                figure.add_scatter(x=list(range(len(y))), y=y, mode="lines+markers", name=said, legendgroup=name,
                                   showlegend=column == 1, line={"dash": dash, "color": colour}, row=1, col=column)
        figure.update_xaxes(title_text="loops", dtick=1, row=1, col=column)
    figure.update_yaxes(title_text="NLL [nat]", rangemode="tozero", col=1)
    laid_out(figure, "", "", width=420 * len(keys) + 40, height=400)
    return figure.update_layout(legend={"y": -0.22, "yanchor": "top"}, margin={"b": 110})


def _title(told: Mapping[str, Any]) -> str:
    if told["kind"] == "control":
        return str(told["name"])
    return "LoopMDM" if told["kind"] == "loop" else "deep twin"


def _named(told: Mapping[str, Any]) -> str:
    """Name, kind where the name does not tell, and number of training seeds."""
    seeds = f" ({len(told['seeds'])} seeds)" if len(told["seeds"]) > 1 else ""
    return f"{told['name']}{', deep twin' if told['kind'] == 'deep' else ''}{seeds}"


def _by_layer(stages: Mapping[str, Any]) -> tuple[list[list[float]], list[str]]:
    """(matrix, labels) of single layers, ordered by layer and then by loop."""
    order = sorted(range(len(stages["loop"])), key=lambda p: (stages["layer"][p], stages["loop"][p]))
    tau = _array(stages["tau"])[np.ix_(order, order)]
    return tau.tolist(), [f"L{stages['layer'][p]} loop {stages['loop'][p]}" for p in order]
