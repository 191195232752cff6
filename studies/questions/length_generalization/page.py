"""More rows than in training, as table and page: pure functions of what was measured.

    html = page(verdict, curves)
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd
import xarray as xr

from studies.questions.length_generalization.figures import rows_figure
from studies.questions.length_generalization.judge import best_loops
from studies.zoo import SHORT_NAMES

WHAT = ("Each model at the number of loops that serves it best; mean over training seeds. If loops "
        "went on applying the rule, a line would stay up. The unlooped twin is in the table only.")


def table(data: xr.Dataset) -> pd.DataFrame:
    """Cells and whole examples right, by kind (down) and number of rows (across)."""
    best = best_loops(data).mean("seed")
    return pd.DataFrame([{"model": SHORT_NAMES[str(kind)], **{
        f"{n} rows": f"{best.cells.sel(kind=kind, n_rows=n).mean():.0%} of cells, "
                     f"{best.exact.sel(kind=kind, n_rows=n):.0%} whole" for n in data.n_rows.values}}
        for kind in data.kind.values])


def page(verdict: Mapping[str, Any], data: xr.Dataset) -> str:
    """HTML of the study; plotly's script comes from the network, the SVG file needs none."""
    return ("<!doctype html><meta charset='utf-8'><title>LoopScope: more rows</title>"
            "<body style='font-family:sans-serif;max-width:860px;margin:2em auto'><h1>More rows than in training</h1>"
            f"<p>{html.escape(verdict['words'])}</p>{table(data).to_html(index=False, border=0)}<p>{WHAT}</p>"
            f"{rows_figure(data).to_html(full_html=False, include_plotlyjs='cdn')}</body>")
