"""Loops × denoising steps as table and page: pure functions of the verdict.

    html = page(verdict, {})                                  # or with figures(verdict["rows"])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from studies.questions.loops_and_steps.judge import ANSWERS, RESTARTS
from studies.questions.loops_and_steps.measure import WAYS
from studies.questions.question_page import Drawings, question_page
from studies.questions.subject_claims import in_words

METHOD = (
    "**Exchange between steps.** The later step sees the model's own surest answers at some of the positions that were "
    "masked (a third, unless told otherwise). The content that enters its first loop is put on the clock that a loop "
    "had in the step before (mean and scale per role), worked on by that loop, brought back, and the later step goes "
    "on from there. τ = 1 − KL ÷ work, as in the stage test. "
    + "; ".join(f"*{name}*: {what}" for name, what in ANSWERS.items()) + ".",
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
    def exchanged(row: Mapping[str, Any], by: str) -> str:
        return "–" if row["answer"] == "nothing" else in_words(row[by], ".2f")

    return pd.DataFrame([{
        "subject": row["subject"], "first loop by the first before": exchanged(row, "first"),
        "by later ones": exchanged(row, "later"), "a step": row["answer"],
        "one more loop gains": in_words(row["restarts"][0]["loop_gain"], ".3f"),
        "a restart gains": in_words(row["restarts"][0]["restart_gain"], ".3f"),
        "after loop 0 a restart is": row["restarts"][0]["decision"],
        "after the others": ", ".join(one["decision"] for one in row["restarts"][1:]) or "–",
        "state after each loop is nearest to, before": " ".join(map(str, row["nearest"]))} for row in verdict["rows"]])


def page(verdict: Mapping[str, Any], drawn: Drawings) -> str:
    """HTML of the study."""
    return question_page(verdict, drawn, table=steps_table(verdict), method=METHOD, limits=LIMITS)
