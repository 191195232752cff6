"""Figure of training: held-out NELBO or accuracy over FLOPs, a line per run.

    drawn = curves({"automaton-loop": table}, "nelbo")
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app.figures.style import styled
from studies.palette import CATEGORIES

AXES = {"nelbo": "held-out NELBO [nat per free token]", "exact": "examples right at S_max, all masked",
        "cells": "free positions right at S_max, all masked", "train_loss": "training loss [nat per free token]"}
"""What can be drawn, and its axis."""


def curves(tables: Mapping[str, pd.DataFrame], measure: str) -> go.Figure:
    """One line per run; NELBOs on a logarithmic axis, shares from 0 to 1."""
    figure = go.Figure()
    for number, (name, table) in enumerate(tables.items()):
        column = measure if measure in table else last_loops(table, measure)
        if column is None:
            continue
        figure.add_scatter(x=table["flops"], y=table[column], name=name, mode="lines+markers", marker={"size": 4},
                           line={"color": CATEGORIES[number % len(CATEGORIES)]})
    share = measure in ("exact", "cells")
    styled(figure, height=460)
    figure.update_xaxes(title_text="training FLOPs", exponentformat="power")
    return figure.update_yaxes(title_text=AXES[measure], type="linear" if share else "log",
                               range=[-0.02, 1.02] if share else None)


def last_loops(table: pd.DataFrame, measure: str) -> str | None:
    """The column of ``measure`` at the most loops it was evaluated with, such as exact@8."""
    columns = [column for column in table if re.fullmatch(rf"{measure}@\d+", str(column))]
    return max(columns, key=lambda column: int(column.partition("@")[2])) if columns else None
