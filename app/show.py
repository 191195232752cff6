"""How a page shows a figure: what am I looking at, the figure, and what can be taken away.

Every figure goes through `figure`, so that none lacks its explanation and its downloads: the
figure as a self-contained HTML page (PNG by the camera in its toolbar), its numbers as CSV.

    show.figure(drawn, "Each cell is …", name="lens", table=lambda: lens.to_dataframe())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
import xarray as xr

from studies.zoo import Problem

Table = Callable[[], pd.DataFrame]
MOST_PROBLEMS = 6
"""Files named in one warning; the others are counted."""


def figure(drawn: go.Figure, what: str, *, name: str, table: Table, title: str = "", alt: str = "") -> None:
    """One figure with title, explanation and downloads. ``name`` is its key and the files' name."""
    if title:
        st.subheader(title, anchor=False)
    st.caption(f":material/visibility: {what}")
    st.plotly_chart(drawn, theme=None, width="stretch", key=f"chart-{name}", config=config(name),
                    alt=alt or title or name)
    downloads(drawn, name=name, table=table)


def problems(found: Sequence[Problem]) -> None:
    """One warning that names every file that was left out, and why; nothing if there is none."""
    if not found:
        return
    lines = [f"- `{problem.file}`: {problem.reason}" for problem in found[:MOST_PROBLEMS]]
    if len(found) > MOST_PROBLEMS:
        lines.append(f"- and {len(found) - MOST_PROBLEMS} more")
    st.warning("Left out, because it cannot be read:\n\n" + "\n".join(lines), icon=":material/broken_image:")


def downloads(drawn: go.Figure, *, name: str, table: Table) -> None:
    """Buttons whose files are made when they are pressed."""
    with st.container(horizontal=True, horizontal_alignment="right", gap="small", key=f"downloads-{name}"):
        st.download_button("CSV", lambda: table().to_csv(index=False), file_name=f"{name}.csv", mime="text/csv",
                           key=f"csv-{name}", icon=":material/table:", type="tertiary", on_click="ignore",
                           help="The numbers behind this figure")
        st.download_button("HTML", lambda: drawn.to_html(include_plotlyjs=True, config=config(name)),
                           file_name=f"{name}.html", mime="text/html", key=f"html-{name}",
                           icon=":material/download:", type="tertiary", on_click="ignore",
                           help="The figure as a page of its own that needs no network. For a PNG use the camera in "
                                "the figure's toolbar.")


def config(name: str) -> dict[str, Any]:
    """Plotly's toolbar: a camera that writes a sharp PNG, no logo."""
    return {"displaylogo": False, "toImageButtonOptions": {"format": "png", "filename": name, "scale": 3},
            "modeBarButtonsToRemove": ["autoScale2d", "zoomIn2d", "zoomOut2d"]}


def table_of(values: xr.Dataset | xr.DataArray) -> pd.DataFrame:
    """A labelled array as a table, one row per value and a column per coordinate."""
    if isinstance(values, xr.DataArray):
        values = values.rename(values.name or str(values.attrs.get("long_name", "value"))).to_dataset()
    return values.to_dataframe().reset_index()
