"""Figure of training: held-out NELBO or accuracy over FLOPs, a line per run.

    drawn = curves({"automaton-loop": table}, "nelbo")
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from app.figures.style import styled
from studies.palette import CATEGORIES, DASHES, KIND_COLOURS

AXES = {"nelbo": "held-out NELBO [nat per free token]", "exact": "examples right at S_max, all masked",
        "cells": "free positions right at S_max, all masked", "train_loss": "training loss [nat per free token]"}
"""What can be drawn, and its axis."""


def curves(tables: Mapping[str, pd.DataFrame], measure: str) -> go.Figure:
    """One line per run; NELBOs on a logarithmic axis, shares from 0 to 1."""
    figure, lines = go.Figure(), line_styles(list(tables))
    for name, table in tables.items():
        column = measure if measure in table else last_loops(table, measure)
        if column is None:
            continue
        figure.add_scatter(x=table["flops"], y=table[column], name=name, mode="lines+markers", marker={"size": 4},
                           line=lines[name])
    share = measure in ("exact", "cells")
    styled(figure, height=460)
    figure.update_xaxes(title_text="training FLOPs", exponentformat="power")
    return figure.update_yaxes(title_text=AXES[measure], type="linear" if share else "log",
                               range=[-0.02, 1.02] if share else None)


def line_styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """A line per run: runs of several kinds have the colour of their kind and a dash per seed, others a colour each."""
    kinds = {name: next((part for part in name.partition(" ")[0].split("-") if part in KIND_COLOURS), "")
             for name in names}
    if len({*kinds.values()}) < 2 or "" in kinds.values():
        return {name: {"color": CATEGORIES[i % len(CATEGORIES)]} for i, name in enumerate(names)}
    seen: Counter[str] = Counter()
    styles = {}
    for name, kind in kinds.items():
        styles[name] = {"color": KIND_COLOURS[kind], "dash": DASHES[seen[kind] % len(DASHES)]}
        seen[kind] += 1
    return styles


def last_loops(table: pd.DataFrame, measure: str) -> str | None:
    """The column of ``measure`` at the most loops it was evaluated with, such as exact@8."""
    columns = [column for column in table if re.fullmatch(rf"{measure}@\d+", str(column))]
    return max(columns, key=lambda column: int(column.partition("@")[2])) if columns else None
