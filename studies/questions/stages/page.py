"""The report of `rerun.py`: figures as pure functions of measurements, and one HTML page.

    html = page(verdict, datasets)                 # self-contained, plotly included
    figure = pattern_distance_figure(datasets["pattern_distance"], verdict["subjects"])
"""

from __future__ import annotations

import html as escape
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from studies.palette import AMOUNT, AROUND_ZERO, DISTANCE, KIND_COLOURS, NEUTRAL, laid_out
from studies.questions.stages.judge import cell_text, notes
from studies.questions.stages.operation import SUBJECTS

KIND_NAMES = {"loop": "LoopMDM", "twin": "unlooped twin, mid repeated S times",
              "deep": "deep twin, mid repeated S times"}


def accuracy_figure(data: xr.Dataset, s_max: int, trained: Mapping[str, float]) -> go.Figure:
    """Accuracy over S for the triplet, beside the accuracy of each twin as it was trained."""
    figure = go.Figure()
    for kind in data.kind.values:
        y = data.accuracy.sel(kind=kind)
        style = {} if kind == "loop" else {"dash": "dot"}
        figure.add_scatter(x=data.n_loops, y=y, name=KIND_NAMES[str(kind)], mode="lines+markers",
                           line={"color": KIND_COLOURS[str(kind)], **style})
    for kind, value in trained.items():
        figure.add_hline(y=value, line={"color": KIND_COLOURS[kind], "width": 1},
                         annotation_text=f"{'twin' if kind == 'twin' else 'deep twin'} as trained",
                         annotation_font_color=KIND_COLOURS[kind])
    figure.add_vline(x=s_max, line={"color": NEUTRAL, "dash": "dash"}, annotation_text="S_max in training",
                     annotation_position="bottom right")
    return laid_out(figure, "loops S in one forward", "share of free cells right", y_range=[0.45, 1.02])


def region_figure(array: xr.DataArray, region: str, *, loop_axis: str) -> go.Figure:
    """Accuracy by region (row) and loop, as a heat map from guessing (0.5 or less) to certain (1)."""
    shown = array.dropna("region")
    figure = go.Figure(go.Heatmap(
        z=shown.transpose("region", loop_axis).values, x=[f"{int(k) + 1}" for k in shown[loop_axis].values],
        y=[f"{region} {int(r)}" for r in shown.region.values], zmin=0.5, zmax=1, colorscale=AMOUNT,
        colorbar={"title": "accuracy"}, texttemplate="%{z:.2f}", textfont={"size": 11}))
    figure.update_yaxes(autorange="reversed")
    return laid_out(figure, "after this many loops", region)


def pattern_distance_figure(data: xr.Dataset, names: Mapping[str, str]) -> go.Figure:
    """Attention distance between every two places of the cycle, one matrix per subject, on one scale."""
    subjects = [str(name).removeprefix("distance_") for name in data.data_vars]
    figure = make_subplots(cols=len(subjects), rows=1, subplot_titles=[names[s] for s in subjects],
                           horizontal_spacing=0.12)
    for column, subject in enumerate(subjects, start=1):
        matrix = data[f"distance_{subject}"]
        layers = np.array([str(label).split(",")[0] for label in matrix[matrix.dims[0]].values])
        order = np.argsort(layers, kind="stable")
        labels = [str(matrix[matrix.dims[0]].values[i]) for i in order]
        figure.update_xaxes(tickangle=90, row=1, col=column)
        figure.add_trace(go.Heatmap(z=matrix.values[np.ix_(order, order)], x=labels, y=labels, zmin=0, zmax=1,
                                    colorscale=DISTANCE, coloraxis="coloraxis"), row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    figure.update_layout(coloraxis={"colorscale": DISTANCE, "cmin": 0, "cmax": 1, "colorbar": {"title": "distance"}})
    return laid_out(figure, "", "", height=420)


def interval_figure(table: list[dict[str, Any]], keys: list[str], names: Mapping[str, str]) -> go.Figure:
    """Chosen rows of the table as dots with intervals, a colour per subject; what is not defined is left out."""
    rows = [row for row in table if row["key"] in keys and any("value" in row.get(name, {}) for name in names)]
    figure = go.Figure()
    for offset, (subject, name) in enumerate(names.items()):
        shown = [row for row in rows if "value" in row.get(subject, {})]
        if not shown:
            continue
        values = [row[subject]["value"] for row in shown]
        figure.add_scatter(
            x=values, y=[rows.index(row) + 0.18 * (offset - 1) for row in shown], mode="markers", name=name,
            marker={"color": KIND_COLOURS[subject], "size": 9},
            error_x={"type": "data", "symmetric": False,
                     "array": [row[subject]["high"] - row[subject]["value"] for row in shown],
                     "arrayminus": [row[subject]["value"] - row[subject]["low"] for row in shown]})
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=[row["measure"] for row in rows],
                        autorange="reversed")
    return laid_out(figure, "value (pure number), with 95% interval over examples; untrained: range over models", "",
                     height=120 + 60 * len(rows))


def frozen_figure(data: xr.Dataset, names: Mapping[str, str]) -> go.Figure:
    """Accuracy when attention is frozen after each loop; the last point is the model left alone."""
    figure = go.Figure()
    for name, curve in data.data_vars.items():
        subject = str(name).removeprefix("accuracy_")
        loops = [f"{int(k) + 1}" for k in curve[curve.dims[0]].values[:-1]] + ["never"]
        figure.add_scatter(x=loops, y=curve.values, name=names[subject], mode="lines+markers",
                           line={"color": KIND_COLOURS[subject]})
    return laid_out(figure, "attention patterns frozen after (pseudo-)loop", "share of free cells right")


def profile_figure(data: xr.Dataset) -> go.Figure:
    """Standardised layer profiles of the mean cycle and of the unlooped twin, side by side."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=["LoopMDM, mid layers averaged over loops", "unlooped twin"],
                           shared_yaxes=True)
    for column, name in enumerate(("loop", "twin"), start=1):
        values = data[name].values
        scaled = (values - values.mean(0)) / np.where(values.std(0) > 1e-12, values.std(0), 1)
        figure.add_trace(go.Heatmap(z=scaled.T, x=data.layer.values, y=data.feature.values, coloraxis="coloraxis"),
                         row=1, col=column)
    figure.update_layout(coloraxis={"colorscale": AROUND_ZERO, "cmid": 0, "cmin": -1.8, "cmax": 1.8,
                                    "colorbar": {"title": "z over layers"}})
    return laid_out(figure, "layer", "", height=420)


def figures(verdict: Mapping[str, Any], datasets: Mapping[str, xr.Dataset]) -> list[tuple[str, str, go.Figure]]:
    """(title, what am I looking at, figure) for everything in the report, in its order."""
    names, region = verdict["subjects"], verdict["setting"]["region"]
    curve = datasets["accuracy_over_loops"]
    s_max = int(curve.n_loops.max()) // 2
    trained = {kind: float(curve.accuracy.sel(kind=kind, n_loops=1)) for kind in ("twin", "deep")}
    return [
        ("Accuracy over loops", "All free cells masked and filled in one forward, at equal training FLOPs. Only the "
         "LoopMDM was trained to be looped; the dotted curves repeat the twins' mid layers all the same.",
         accuracy_figure(curve, s_max, trained)),
        ("Operation: is attention of a layer the same in every loop?", "Distances between attention patterns of "
         "every two places, ordered by layer. Dark blocks on the diagonal: a layer's attention is alike in all loops. "
         "One of the untrained models is shown.",
         pattern_distance_figure(datasets["pattern_distance"], {**names, "untrained": SUBJECTS["untrained"]})),
        ("Operation: distances and their ratio",
         "A ratio of 1 says that being the same layer does not matter; 0 that attention is the same in all loops. "
         "Shared weights bring it below 1 without any training, as the untrained models show: it does not tell whether "
         "an operation is repeated. Intervals narrower than a dot are hidden by it.",
         interval_figure(verdict["table"], ["within", "between", "ratio"], names)),
        ("Operation: freezing attention", "Later loops must reuse the attention patterns of an earlier one.",
         frozen_figure(datasets["frozen_attention"], names)),
        ("Operation: variance of signatures", "What a layer does, in eight numbers, split by layer-in-cycle and by "
         "loop.",
         interval_figure(verdict["table"], ["variance_layer", "variance_loop", "variance_interaction"], names)),
        ("Operation: the mean cycle beside the unlooped twin", "Each feature standardised over layers, so that colour "
         "says where in the network it is high or low.", profile_figure(datasets["profile"])),
        (f"Content: {region}s answered if looping stopped here",
         "The coda lens: the tail reads the state after each loop.",
         region_figure(datasets["coda_by_region"].accuracy, region, loop_axis="loop")),
        (f"Content: {region}s that a linear probe reads, LoopMDM",
         f"One ridge probe per loop and {region}, on held-out examples.",
         region_figure(datasets["probe_by_region"].accuracy_loop, region, loop_axis="loop_loop")),
        (f"Content: {region}s that a linear probe reads, deep twin", "The same after each of its pseudo-loops.",
         region_figure(datasets["probe_by_region"].accuracy_control, region, loop_axis="loop_control")),
    ]


def page(verdict: Mapping[str, Any], datasets: Mapping[str, xr.Dataset]) -> str:
    """One HTML page that needs no network: verdict, table, figures with explanations, provenance."""
    parts = []
    for i, (title, explanation, figure) in enumerate(figures(verdict, datasets)):
        body = figure.to_html(full_html=False, include_plotlyjs=i == 0, div_id=f"figure-{i}",
                              config={"displaylogo": False})
        parts.append(f"<h2>{escape.escape(title)}</h2><p>{escape.escape(explanation)}</p>{body}")
    return _PAGE.format(question=escape.escape(verdict["question"]), conclusion=escape.escape(verdict["conclusion"]),
                        operation=escape.escape(verdict["operation"]["words"]),
                        content=escape.escape(verdict["content"]["words"]),
                        seeds=escape.escape(verdict.get("over_seeds", "")), table=_table(verdict),
                        notes="".join(f"<p>{escape.escape(note)}</p>" for note in notes(verdict)),
                        seed_table=_seed_table(verdict), figures="\n".join(parts),
                        provenance=_provenance(verdict["provenance"]))


def _table(verdict: Mapping[str, Any]) -> str:
    names = verdict["subjects"]
    head = "".join(f"<th>{escape.escape(n)}</th>" for n in ["measure", *names.values()])
    rows = []
    for row in verdict["table"]:
        cells = "".join(f"<td>{cell_text(row.get(subject))}</td>" for subject in names)
        rows.append(f"<tr title='{escape.escape(row['definition'], quote=True)}'><td>{escape.escape(row['measure'])}"
                    f"</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _seed_table(verdict: Mapping[str, Any]) -> str:
    """Point estimates of every training run, LoopMDM / deep twin."""
    seeds = verdict.get("seeds", {})
    if len(seeds) < 2:
        return ""
    head = "".join(f"<th>{escape.escape(n)}</th>" for n in ["LoopMDM / deep twin", *seeds])
    rows = []
    for row in verdict["table"]:
        shown = [["not defined" if value is None else f"{value:.2f}"
                  for subject, value in seed["values"][row["key"]].items() if subject != "untrained"]
                 for seed in seeds.values()]
        cells = "".join(f"<td>{' / '.join(values)}</td>" for values in shown)
        rows.append(f"<tr><td>{escape.escape(row['measure'])}</td>{cells}</tr>")
    return f"<h2>Over training runs</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def _provenance(values: Mapping[str, Any]) -> str:
    models = "".join(f"<li>{escape.escape(name)}: <code>{m['sha256'][:16]}…</code>, made by <code>"
                     f"{escape.escape(m['command'])}</code></li>" for name, m in values["models"].items())
    return (f"<p><code>{escape.escape(values['program'])}</code>, {values['seconds']:.0f} s on "
            f"{values['threads']} threads, {escape.escape(str(values['versions']))}</p><ul>{models}</ul>")


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{question}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}}
h1{{font-size:1.5em}}h2{{font-size:1.15em;margin-top:2em}}table{{border-collapse:collapse;font-size:.86em}}
td,th{{border-bottom:1px solid #ddd;padding:.35em .6em;text-align:left;vertical-align:top}}
.words{{background:#f3f6fa;border-left:4px solid #0072B2;padding:.6em 1em}}</style>
<h1>{question}</h1><div class="words"><p><b>{conclusion}</b></p><p>{operation}</p><p>{content}</p><p>{seeds}</p></div>
<h2>What was measured, in one table</h2><p>Hover a row for its definition.</p>{table}{notes}
{seed_table}{figures}<h2>Where this comes from</h2>{provenance}</html>
"""
