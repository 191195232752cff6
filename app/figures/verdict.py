"""Figure of what was measured: every measure on its own axis, the LoopMDM beside its controls, with intervals.

    figure = evidence(verdict["table"], verdict["subjects"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from app.figures.style import styled
from studies.palette import FAINT, KIND_COLOURS

LINE_PX, GAP_PX = 15, 40
"""Height of a line of a strip, and of the gap between strips, which holds ticks and the next one's title."""
MARGIN = {"l": 16, "r": 16, "t": 92, "b": 44}


def evidence(table: Sequence[Mapping[str, Any]], subjects: Mapping[str, str]) -> go.Figure:
    """Dots with intervals, one strip per measure, one line per subject that has a value; untrained models as dots.

    Every row of ``table`` must have a value of at least one subject.
    """
    shown = [[s for s in subjects if "value" in row.get(s, {})] for row in table]
    heights = [len(here) + 1.6 for here in shown]
    inner = LINE_PX * sum(heights) + GAP_PX * (len(table) - 1)
    total = round(inner + MARGIN["t"] + MARGIN["b"])
    figure = make_subplots(len(table), 1, row_heights=heights, vertical_spacing=GAP_PX / inner if len(table) > 1 else 0,
                           subplot_titles=[str(row["measure"]) for row in table])
    named: set[str] = set()
    for i, (row, here) in enumerate(zip(table, shown, strict=True), start=1):
        for y, subject in enumerate(here):
            cell = row[subject]
            colour = KIND_COLOURS.get(subject, FAINT)
            text = f"{subjects[subject]}: {cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
            figure.add_trace(go.Scatter(
                x=[cell["value"]], y=[y], mode="markers", name=subjects[subject], legendgroup=subject,
                showlegend=subject not in named, marker={"color": colour, "size": 10},
                error_x={"type": "data", "symmetric": False, "array": [cell["high"] - cell["value"]],
                         "arrayminus": [cell["value"] - cell["low"]], "color": colour, "thickness": 2, "width": 5},
                hovertemplate=f"{text}<extra>{row['measure']}</extra>"), row=i, col=1)
            named.add(subject)
            if each := cell.get("each"):
                figure.add_trace(go.Scatter(
                    x=each, y=[y] * len(each), mode="markers", name=subjects[subject], legendgroup=subject,
                    showlegend=False, marker={"color": colour, "size": 6, "symbol": "line-ns-open"},
                    hovertemplate=f"one of {len(each)}: %{{x:.3f}}<extra>{row['measure']}</extra>"), row=i, col=1)
        figure.update_yaxes(range=[len(here) - 0.4, -0.6], row=i, col=1)
        low, high = (pick(row[s][end] for s in here) for pick, end in ((min, "low"), (max, "high")))
        anchor = 1.0 if "ratio" in str(row["measure"]) else 0.0
        low, high = min(low, anchor), max(high, anchor)
        pad = 0.06 * (high - low or 1)
        figure.update_xaxes(range=[low - pad, high + pad], row=i, col=1)
        figure.add_vline(x=anchor, line={"color": FAINT, "width": 1, "dash": "dot"}, row=i, col=1)
    styled(figure, height=total)
    figure.update_annotations(x=0, xanchor="left", font={"size": 12.5})
    figure.update_yaxes(showticklabels=False, showgrid=False, zeroline=False)
    figure.update_xaxes(tickfont={"size": 10}, zeroline=False)
    figure.update_xaxes(title_text="value (pure number), dot and interval", row=len(table))
    figure.update_layout(margin=MARGIN, legend={"y": 1, "yref": "container", "yanchor": "top"})
    return figure
