"""Training: the curves of the zoo, and of runs that are still going, followed while they train."""

from __future__ import annotations

import time

import pandas as pd
import streamlit as st

from app import data, show
from app.figures.training import AXES, curves

FRESH_S = 300
"""A run whose file has changed within so many seconds is taken to be going."""


def main() -> None:
    st.title("Training: held-out quality over FLOPs", anchor=False)
    tables, problems = data.training_tables()
    show.problems(problems)
    if not tables:
        st.info(f"No curves: neither `{data.zoo_folder()}` nor `{data.runs_folder()}` holds any. Start a run with "
                "`python studies/pretrain.py --preset automaton`; it appears here with its first evaluation.",
                icon=":material/show_chart:")
        return
    groups = sorted({group_of_run(name) for name in tables})
    with st.sidebar:
        group = st.selectbox("Task", groups, key="group", bind="query-params")
        measure = st.selectbox("Measure", list(AXES), format_func=AXES.__getitem__, key="measure", bind="query-params")
        follow = st.toggle("Follow", value=False, key="follow", bind="query-params",
                           help="Read the files again every five seconds.")
    st.fragment(_drawn, run_every=5 if follow else None)(group, measure)


def _drawn(group: str, measure: str) -> None:
    tables = {name: table for name, table in data.training_tables()[0].items() if group_of_run(name) == group}
    going = [name for name, age in data.training_ages().items() if name in tables and age < FRESH_S]
    if going:
        st.caption(f":green[:material/play_arrow:] going: {', '.join(going)} (read at {time.strftime('%X')})")
    long = pd.concat([table.assign(run=name) for name, table in tables.items()])
    show.figure(curves(tables, measure), "Each point is an evaluation of the averaged weights on held-out examples. "
                "Runs in one plot share a task; those of a triplet share a budget of FLOPs.", name="training",
                title="Curves", table=lambda: long)


def group_of_run(name: str) -> str:
    """The task of a run or zoo entry: what its name begins with; ablations are a group of their own."""
    task = name.partition(" ")[0].split("-")[0]
    return f"{task}, ablations" if "-ablation-" in name else task


main()
