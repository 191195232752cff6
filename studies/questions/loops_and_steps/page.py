"""Loops × denoising steps as table and page: pure functions of the verdict.

    html = page(verdict, {})                                  # or with figures(verdict["rows"])
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from studies.questions.loops_and_steps.judge import ANSWERS, RESTARTS
from studies.questions.loops_and_steps.measure import WAYS

METHOD = (
    "**Exchange between steps.** The later step sees the model's own surest answers at a third of the positions that "
    "were masked. The content that enters its first loop is put on the clock that a loop had in the step before (mean "
    "and scale per role), worked on by that loop, brought back, and the later step goes on from there. τ = 1 − KL ÷ "
    "work, as in the stage test. " + "; ".join(f"*{name}*: {what}" for name, what in ANSWERS.items()) + ".",
    "**Restart.** After k + 1 loops the surest half of the answers is written into the input, and one loop is run from "
    "scratch; everything is read at the positions that are masked still. "
    + "; ".join(f"*{name}*: {what}" for name, what in WAYS.items()) + ". "
    + "; ".join(f"*{name}*: {what}" for name, what in RESTARTS.items()) + ".",
    "Intervals are 95%, over training seeds and examples; decisions hold after Holm's correction over the page. δ is "
    "0.01 nat, or 1% of the NLL after one loop.",
)
LIMITS = (
    "Where all loops do the same, an exchange cannot tell the first loop from a later one.",
    "A restart loses what the loops hold and tokens do not say; it is compared with one more loop, not with many.",
)


def steps_table(verdict: Mapping[str, Any]) -> pd.DataFrame:
    """A row per subject."""
    return pd.DataFrame([{
        "subject": row["subject"], "first loop by the first before": _told(row["first"], ".2f"),
        "by later ones": _told(row["later"], ".2f"), "a step": row["answer"],
        "one more loop gains": _told(row["restarts"][0]["loop_gain"], ".3f"),
        "a restart gains": _told(row["restarts"][0]["restart_gain"], ".3f"),
        "after loop 0 a restart is": row["restarts"][0]["decision"],
        "after the others": ", ".join(one["decision"] for one in row["restarts"][1:]) or "–",
        "state after each loop is nearest to, before": " ".join(map(str, row["nearest"]))} for row in verdict["rows"]])


def _told(numbers: Mapping[str, float], form: str) -> str:
    return f"{numbers['value']:{form}} [{numbers['low']:{form}}, {numbers['high']:{form}}]"


def page(verdict: Mapping[str, Any], drawn: Mapping[str, tuple[str, str, go.Figure]]) -> str:
    """HTML of the study; plotly's script comes from the network, the SVG files need none."""
    words = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdict["words"])
    shown = "".join(f"<h2>{html.escape(title)}</h2>{figure.to_html(full_html=False, include_plotlyjs='cdn')}"
                    f"<p>{html.escape(what)}</p>" for title, what, figure in drawn.values())
    method = "".join(f"<p>{html.escape(text.replace('*', ''))}</p>" for text in (*METHOD, *LIMITS))
    return (f"<!doctype html><meta charset='utf-8'><title>LoopScope: {html.escape(verdict['question'])}</title>"
            "<body style='font-family:sans-serif;max-width:960px;margin:2em auto'>"
            f"<h1>{html.escape(verdict['question'])}</h1><ul>{words}</ul>{shown}"
            f"{steps_table(verdict).to_html(index=False, border=0)}<h2>How it is measured</h2>{method}</body>")
