"""The noise level as table and page: pure functions of the verdict.

    html = page(verdict, {})                                  # or with figures(verdict["rows"])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from studies.questions.noise_level.judge import BEYOND, MOVED, READABLE
from studies.questions.noise_level.measure import RANDOM, READERS, STEP
from studies.questions.question_page import Drawings, question_page
from studies.questions.subject_claims import in_words

METHOD = (
    "**Read.** Ridge regressions tell the share of the sequence that is masked; half of the examples fit, half judge. "
    + "; ".join(f"*{name}*: {what}" for name, what in READERS.items())
    + f". *Decodable*: R² above {READABLE:g} with its interval. *More than confidence*: of the squared error that "
    f"confidence leaves, the state explains more than {BEYOND:g}.",
    f"**Moved.** The slope of the state on the share, times ± {STEP:g}, is added to the state that enters loop 1 at "
    "all masked positions. The work of loop 1 is the divergence of the answer that leaving it out makes. "
    f"{RANDOM} random directions of the same length stand beside it. "
    + "; ".join(f"*{name}*: {what}" for name, what in MOVED.items()) + ".",
    "Intervals are 95%, over training seeds and examples; decisions hold after Holm's correction over the page. δ is "
    "0.01 nat, or 1% of the NLL.",
)
LIMITS = (
    "An untrained model is read well too: that the noise level can be decoded is no evidence that it is used.",
    "The slope is linear; a noise level that is kept on a curve would be moved along a chord.",
)


def noise_table(verdict: Mapping[str, Any]) -> pd.DataFrame:
    """A row per subject."""
    return pd.DataFrame([{
        "subject": row["subject"], "before the loops, R²": in_words(row["r2_first"], ".2f"),
        "after the last loop, R²": in_words(row["r2_last"], ".2f"), "so it is": row["read"],
        "untrained": "–" if row["r2_untrained"] is None else f"{row['r2_untrained'][-1]:.2f}",
        "shuffled": f"{row['r2_shuffled']:.2f}", "beyond confidence": in_words(row["partial"], ".2f"),
        "more than confidence": row["beyond_confidence"],
        "moving up changes the work by": in_words(row["change_of_work"], ".3f"),
        "the entropy by": in_words(row["change_of_entropy"], ".3f"),
        "the NLL by": in_words(row["change_of_nll"], ".3f"),
        "beyond random pushes": in_words(row["extra_work"], ".3f"), "moving along it": row["moved"]}
        for row in verdict["rows"]])


def page(verdict: Mapping[str, Any], drawn: Drawings) -> str:
    """HTML of the study."""
    return question_page(verdict, drawn, table=noise_table(verdict), method=METHOD, limits=LIMITS)
