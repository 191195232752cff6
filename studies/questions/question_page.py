"""The HTML page of a question with a row per subject: sentences, figures, table, method and limits.

    html = question_page(verdict, {}, table=pd.DataFrame(verdict["rows"]), method=("How.",), limits=())
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

Drawings = Mapping[str, tuple[str, str, go.Figure]]
"""Figures of a study by name: title, what it shows, and the figure."""


def question_page(verdict: Mapping[str, Any], drawn: Drawings, *, table: pd.DataFrame, method: Sequence[str],
                  limits: Sequence[str]) -> str:
    """HTML; plotly's script comes from the network, the SVG files beside the page need none."""
    words = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdict["words"])
    shown = "".join(f"<h2>{html.escape(title)}</h2>{figure.to_html(full_html=False, include_plotlyjs='cdn')}"
                    f"<p>{html.escape(what)}</p>" for title, what, figure in drawn.values())
    how = "".join(f"<p>{html.escape(text.replace('*', ''))}</p>" for text in (*method, *limits))
    return (f"<!doctype html><meta charset='utf-8'><title>LoopScope: {html.escape(verdict['question'])}</title>"
            "<body style='font-family:sans-serif;max-width:960px;margin:2em auto'>"
            f"<h1>{html.escape(verdict['question'])}</h1><ul>{words}</ul>{shown}"
            f"{table.to_html(index=False, border=0)}<h2>How it is measured</h2>{how}</body>")
