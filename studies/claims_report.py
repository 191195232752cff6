"""The claims study as figures and pages: pure functions of measurements and judgements.

    figures = claim_figures(pooled)                       # {"a": figure, …}
    text = claims_page({"automaton": judged}, …)          # results/claims.md
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from studies.claims_judge import SMALLEST_NAT, SMALLEST_RATIO, SMALLEST_SHARE, Judgement

COLOURS = {"loop": "#0072B2", "deep": "#D55E00", "twin": "#009E73"}
"""Okabe and Ito's colour-blind safe palette, as in the other reports."""
NAMES = {"loop": "LoopMDM", "twin": "unlooped twin", "deep": "deep twin"}
TITLES = {"a": "NELBO over training FLOPs", "b": "Exact accuracy at equal training FLOPs", "c": "Accuracy over loops",
          "d": "Loop gain by noise level", "e": "Mask-to-mask attention by loop", "f": "Adaptive looping",
          "g": "Loops against denoising steps"}

HOW_JUDGED = ("Intervals are 95%: over seeds (Student's t, of the logarithm where the quantity is a ratio) where there "
              "are several, else over held-out examples (bootstrap), which says nothing about another training run; "
              "they end where the quantity's range does. A difference counts from "
              f"{SMALLEST_NAT:g} nat, from {100 * SMALLEST_SHARE:g} points of accuracy and from {SMALLEST_SHARE:g} of "
              f"attention, a ratio from {1 + SMALLEST_RATIO:g}: a claim holds if the whole interval is above that, and "
              "does not if the whole interval is below.")
"""How intervals are made and when a claim holds, in words."""


@dataclass(frozen=True)
class Group:
    """One task at one difficulty: the triplets of all its seeds, judged."""

    name: str
    task: str                        # the task and its difficulty, in words
    seeds: list[int]
    entries: list[str]
    judgements: dict[str, Judgement]


def claim_figures(pooled: Mapping[str, xr.Dataset]) -> dict[str, go.Figure]:
    """One figure per claim; thin lines are seeds, thick ones their mean."""
    loops, noise, attention = pooled["loops"], pooled["noise"], pooled["attention"]
    s_max = int(loops.n_loops.values[-1]) // 4
    figures = {"a": go.Figure(), "b": go.Figure(), "c": go.Figure(), "d": go.Figure(), "e": go.Figure()}
    for kind in loops.kind.values:
        _seeds(figures["a"], pooled["training"].nelbo.sel(kind=kind), "flops", str(kind))
    _laid_out(figures["a"], "training FLOPs (thick line: mean of the seeds)" if loops.sizes["seed"] > 1
              else "training FLOPs", "held-out NELBO [nat per free token]", log_y=True)
    figures["a"].update_xaxes(exponentformat="power")
    figures["a"].update_yaxes(dtick=1 if _decades(pooled["training"].nelbo) > 1 else None, exponentformat="power")
    for kind in loops.kind.values:
        at = loops.exact.sel(kind=kind, n_loops=s_max if kind == "loop" else 1).mean("example")
        figures["b"].add_bar(x=[NAMES[kind]], y=[float(at.mean("seed"))], marker_color=COLOURS[kind], name=NAMES[kind])
        figures["b"].add_scatter(x=[NAMES[kind]] * at.sizes["seed"], y=at.values, mode="markers", showlegend=False,
                                 marker={"color": "black", "size": 7, "symbol": "circle-open"})
    _laid_out(figures["b"], "", "examples right (points: seeds)", y_range=[0, 1.02])
    for name, dash in (("exact", "solid"), ("cells", "dot")):
        _seeds(figures["c"], loops[name].sel(kind="loop").mean("example"), "n_loops", "loop",
               label=f"LoopMDM, {'examples' if name == 'exact' else 'cells'} right", dash=dash)
    for kind in ("twin", "deep"):
        if kind in loops.kind:
            figures["c"].add_hline(y=float(loops.exact.sel(kind=kind, n_loops=1).mean()), annotation_text=NAMES[kind],
                                   line={"color": COLOURS[kind], "width": 1}, annotation_font_color=COLOURS[kind])
    figures["c"].add_vline(x=s_max, line={"color": "grey", "dash": "dash"}, annotation_text="S_max")
    _laid_out(figures["c"], "loops S in one forward", "share right, all masked", y_range=[0, 1.02])
    _seeds(figures["d"], noise.gain.mean("example"), "t", "loop")
    _laid_out(figures["d"], "noise level t", "NLL(S = 1) − NLL(S_max) [nat per masked token]")
    _seeds(figures["e"], attention.flow.mean("example"), "loop", "loop")
    figures["e"].add_vline(x=s_max, line={"color": "grey", "dash": "dash"}, annotation_text="S_max")
    _laid_out(figures["e"], "loop", "share of attention from masked to masked positions")
    return {**figures, "f": _adaptive_figure(pooled["adaptive"]), "g": _sampling_figure(pooled["sampling"])}


def _adaptive_figure(data: xr.Dataset) -> go.Figure:
    figure = go.Figure()
    used = data.loops_used.mean(["seed", "example"])
    for name, label, dash in (("exact", "examples right", "solid"), ("cells", "cells right", "dot")):
        figure.add_scatter(x=used.values, y=data[name].mean(["seed", "example"]).values, name=label,
                           mode="lines+markers", line={"color": COLOURS["loop"], "dash": dash},
                           text=[f"τ = {t:g}" for t in data.threshold.values])
    return _laid_out(figure, "loops used on average (each point one threshold τ)", "share right", y_range=[0, 1.02])


def _sampling_figure(data: xr.Dataset) -> go.Figure:
    figure = go.Figure()
    equal = data.equal_exact.mean(["seed", "example"])
    figure.add_scatter(x=data.n_steps_of_plan.values, y=equal.values, mode="lines+markers+text",
                       textposition="top center", text=[f"S = {s}" for s in data.n_loops.values],
                       name="equal total compute", line={"color": COLOURS["loop"]})
    for row, s in enumerate(data.loops.values):
        values = data.steps_exact.isel(loops=row).mean(["seed", "example"])
        figure.add_scatter(x=data.n_steps.values, y=values.values, mode="lines+markers", name=f"S = {s}",
                           line={"dash": "dot", "color": ["#7F7F7F", "#CC79A7"][row]})
    ticks = sorted({*data.n_steps_of_plan.values.tolist(), *data.n_steps.values.tolist()})
    _laid_out(figure, "denoising steps", "examples right", y_range=[0, 1.08])
    return figure.update_xaxes(type="log", tickvals=ticks, ticktext=list(map(str, ticks)))


def _seeds(figure: go.Figure, values: xr.DataArray, axis: str, kind: str, *, label: str | None = None,
           dash: str = "solid") -> None:
    """A thin line per seed, and a thick one of their mean, if any was measured; values over (seed, ``axis``)."""
    x, lines = seed_lines(values, axis)
    if not lines:
        return
    for own_x, own_y in lines if len(lines) > 1 else []:
        figure.add_scatter(x=own_x, y=own_y, mode="lines", showlegend=False, opacity=0.35,
                           line={"color": COLOURS[kind], "width": 1, "dash": dash})
    figure.add_scatter(x=x, y=np.mean([np.interp(x, own_x, own_y) for own_x, own_y in lines], axis=0),
                       mode="lines+markers", name=label or NAMES[kind], marker={"size": 5},
                       line={"color": COLOURS[kind], "width": 2.5, "dash": dash})


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


def _laid_out(figure: go.Figure, x: str, y: str, *, y_range: list[float] | None = None,
              log_y: bool = False) -> go.Figure:
    figure.update_layout(template="plotly_white", width=640, height=360, margin={"l": 70, "r": 30, "t": 40, "b": 60},
                         legend={"orientation": "h", "y": 1.15, "x": 0})
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y, range=y_range, type="log" if log_y else None)
    return figure


def group_page(group: Group, figures: Mapping[str, go.Figure]) -> str:
    """HTML of one group, the figures alive; plotly's script comes from the network, the SVG files need none."""
    parts = [f"<h1>The paper's claims on {html.escape(group.task)}</h1>"]
    for number, (letter, judgement) in enumerate(group.judgements.items()):
        listed = "".join(f"<li>{html.escape(q.text)}</li>" for q in judgement.quantities)
        drawn = figures[letter].to_html(full_html=False, include_plotlyjs="cdn" if number == 0 else False)
        parts.append(f"<h2>({letter}) {html.escape(judgement.claim)}</h2><p><b>{judgement.word}</b> "
                     f"{html.escape(judgement.note + judgement.missing)}</p><ul>{listed}</ul>{drawn}")
    return ("<!doctype html><meta charset='utf-8'><title>LoopScope: claims</title>"
            f"<body style='font-family:sans-serif;max-width:760px;margin:2em auto'>{''.join(parts)}</body>")


def claims_page(groups: list[Group], *, command: str, pictures: bool) -> str:
    """results/claims.md: a table of all verdicts, then each task, claim by claim."""
    letters = list(TITLES)
    lines = ["# The paper's claims, tested again", "",
             f"Made by `{command}`; measurements, figures and verdicts of each task are in `results/claims-*`. "
             "The claims are those of LoopMDM (arXiv 2605.26106), at the scale of this zoo (models of 0.2 to 1 million "
             f"parameters). {HOW_JUDGED}", "",
             "| claim | " + " | ".join(group.name for group in groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for letter in letters:
        lines.append(f"| ({letter}) {TITLES[letter]} | "
                     + " | ".join(group.judgements[letter].word
                                    + ", in part" * group.judgements[letter].in_part for group in groups) + " |")
    for group in groups:
        seeds = ", ".join(map(str, group.seeds))
        lines += ["", f"## {group.name}", "", f"{group.task}. Seeds {seeds}; models {', '.join(group.entries)}. "
                  f"[Live figures](claims-{group.name}/report.html).", ""]
        for letter, judgement in group.judgements.items():
            lines += [f"### ({letter}) {judgement.claim}", "",
                      " ".join(filter(None, (
                          f"**{judgement.word[0].upper()}{judgement.word[1:]}{', in part' * judgement.in_part}.**",
                          judgement.note, f"Not measured: {judgement.missing}" if judgement.missing else ""))), ""]
            lines += [f"- {q.text}" + ("" if q.bound is None else f" → {q.word}") for q in judgement.quantities]
            if pictures:
                lines += ["", f"![{TITLES[letter]}](claims-{group.name}/{letter}.svg)"]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"
