"""The study as one HTML page, all words from the verdict.

    html = page(verdict, figures(verdict["found"], verdict["main"]))
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from probes.stage_rule import IDLE, UNKNOWN
from studies.questions.stage_test.figures import Drawn
from studies.questions.stage_test.judge import cell_text

METHOD = (
    "For each two loops k and j: take the content of the state that enters loop k, put it on loop j's clock (mean and "
    "scale of the states that enter j), apply loop j, put the outcome on the clock of what follows k, and go on. "
    "τ(k, j) = 1 − KL(that answer) ÷ KL(the answer with loop k's work left out). 100% means that loop j does all of "
    "loop k's work, 0% that it is as good as leaving it out.",
    "Letters name what the loops do, loop by loop from loop 0: loops that can do each other's work have the same "
    f"letter. “{IDLE}” is a loop without work, “{UNKNOWN}” one whose letter is not decided.",
    "A fitted basis (one linear map per place, fitted on other examples) is tried where τ as it stands does not say "
    "“the same”. The rule that turns τ, work and gain into a regime, its thresholds and its controls are in "
    "docs/stage_test.md; results/calibration/page.md says how often it is right.")

LIMITS = (
    "τ asks whether operations can be exchanged in what they do to the answer; it does not say what the operation is.",
    "Models here have 0.04 to 1 million parameters and were trained on synthetic tasks, one on text.",
    "Decisions are corrected for their number within each subject's report (Holm), not over all subjects together.")


def rows_for_table(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of subjects, its cells as text."""
    return [{"subject": row["subject"], "kind": row["kind"], "seeds": row["seeds"], "t": row["t"],
             "regime": row["regime"] + (" (drifting basis)" if row["basis"] == "drifting" and row["regime"] not in
                                        ("undecided", "nothing") else ""),
             "at other levels": ", ".join(f"{t}: {regime}" for t, regime in row["elsewhere"].items()),
             "letters": row["letters"], "stages": row["stages"], "another loop's τ": cell_text(row, "tau"),
             "in a fitted basis": cell_text(row, "aligned_tau"), "same layer's τ": cell_text(row, "same_layer_tau"),
             "another layer's τ": cell_text(row, "other_layer_tau"),
             "work [nat]": "–" if row["work"] is None else f"{row['work']['']:.3f}",
             "gain per loop [nat]": "–" if row["gain"] is None else f"{row['gain']['']:.3f}"}
            for row in verdict["subjects"]]


def page(verdict: Mapping[str, Any], drawn: Drawn) -> str:
    """One HTML page that needs no network: answer, sentences, figures, table, what is open, where it comes from."""
    parts = []
    for number, (title, what, figure) in enumerate(drawn.values()):
        body = figure.to_html(full_html=False, include_plotlyjs=number == 0, div_id=f"figure-{number}",
                              config={"displaylogo": False})
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(what)}</p>{body}")
    made = verdict["provenance"]
    models = "".join(f"<li>{html.escape(name)}: <code>{model['sha256'][:16]}…</code>, made by <code>"
                     f"{html.escape(model['command'])}</code></li>" for name, model in made["models"].items())
    return _PAGE.format(
        question=html.escape(verdict["question"]), answer=html.escape(verdict["answer"]), words=_list(verdict["words"]),
        figures="\n".join(parts), method="".join(f"<p>{html.escape(text)}</p>" for text in METHOD),
        table=_table(rows_for_table(verdict)), open=_list(verdict["open"]) or "<p>Nothing.</p>", limits=_list(LIMITS),
        provenance=f"<p><code>{html.escape(made['program'])}</code>, {made['seconds']:.0f} s, "
                   f"{html.escape(str(made['versions']))}</p><ul>{models}</ul>")


def _list(sentences: Any) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (rows[0] if rows else ()))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>"
                   for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{question}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}}
h1{{font-size:1.5em}}h2{{font-size:1.15em;margin-top:2em}}table{{border-collapse:collapse;font-size:.8em}}
td,th{{border-bottom:1px solid #ddd;padding:.3em .5em;text-align:left;vertical-align:top}}
.words{{background:#f3f6fa;border-left:4px solid #0072B2;padding:.6em 1em}}</style>
<h1>{question}</h1><div class="words"><p><b>{answer}</b></p>{words}</div>{figures}
<h2>How it is measured</h2>{method}<h2>Every subject</h2>{table}<h2>What is undecided, and why</h2>{open}
<h2>Limits</h2>{limits}<h2>Where this comes from</h2>{provenance}</html>
"""
