"""The claims study as pages: pure functions of judgements and figures.

    html = group_page(group, figures(pooled))             # results/claims-automaton/report.html
    text = page([group], command="…", pictures=True)      # results/claims.md
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

import plotly.graph_objects as go

from studies.questions.claims.judge import SMALLEST_NAT, SMALLEST_RATIO, SMALLEST_SHARE, Judgement

TITLES = {"a": "NELBO over training FLOPs", "b": "Exact accuracy at equal training FLOPs", "c": "Accuracy over loops",
          "d": "Loop gain by noise level", "e": "Mask-to-mask attention by loop", "f": "Adaptive looping",
          "g": "Loops against denoising steps"}

HOW_JUDGED = ("Intervals are 95%: over seeds (Student's t, of the logarithm where the quantity is a ratio) where there "
              "are several, else over held-out examples (bootstrap), which says nothing about another training run; "
              "they end where the quantity's range does. A difference counts from "
              f"{SMALLEST_NAT:g} nat, from {100 * SMALLEST_SHARE:g} points of accuracy and from {SMALLEST_SHARE:g} of "
              f"attention, a ratio from {1 + SMALLEST_RATIO:g}: a claim holds if the whole interval is above that, and "
              "does not if the whole interval is below.")
"""How intervals are made and when a claim holds, in words."""


@dataclass(frozen=True)
class Group:
    """One task at one difficulty: the triplets of all its seeds, judged."""

    name: str
    task: str                        # the task and its difficulty, in words
    seeds: list[int]
    entries: list[str]
    judgements: dict[str, Judgement]


def group_page(group: Group, figures: Mapping[str, go.Figure]) -> str:
    """HTML of one group, the figures alive; plotly's script comes from the network, the SVG files need none."""
    parts = [f"<h1>The paper's claims on {html.escape(group.task)}</h1>"]
    for number, (letter, judgement) in enumerate(group.judgements.items()):
        listed = "".join(f"<li>{html.escape(q.text)}</li>" for q in judgement.quantities)
        drawn = figures[letter].to_html(full_html=False, include_plotlyjs="cdn" if number == 0 else False)
        parts.append(f"<h2>({letter}) {html.escape(judgement.claim)}</h2><p><b>{judgement.word}</b> "
                     f"{html.escape(judgement.note + judgement.missing)}</p><ul>{listed}</ul>{drawn}")
    return ("<!doctype html><meta charset='utf-8'><title>LoopScope: claims</title>"
            f"<body style='font-family:sans-serif;max-width:760px;margin:2em auto'>{''.join(parts)}</body>")


def page(groups: list[Group], *, command: str, pictures: bool) -> str:
    """results/claims.md: a table of all verdicts, then each task, claim by claim."""
    letters = list(TITLES)
    lines = ["# The paper's claims, tested again", "",
             f"Made by `{command}`; measurements, figures and verdicts of each task are in `results/claims-*`. "
             "The claims are those of LoopMDM (arXiv 2605.26106), at the scale of this zoo (models of 0.2 to 1 million "
             f"parameters). {HOW_JUDGED}", "",
             "| claim | " + " | ".join(group.name for group in groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for letter in letters:
        lines.append(f"| ({letter}) {TITLES[letter]} | "
                     + " | ".join(group.judgements[letter].word
                                    + ", in part" * group.judgements[letter].in_part for group in groups) + " |")
    for group in groups:
        seeds = ", ".join(map(str, group.seeds))
        lines += ["", f"## {group.name}", "", f"{group.task}. Seeds {seeds}; models {', '.join(group.entries)}. "
                  f"[Live figures](claims-{group.name}/report.html).", ""]
        for letter, judgement in group.judgements.items():
            lines += [f"### ({letter}) {judgement.claim}", "",
                      " ".join(filter(None, (
                          f"**{judgement.word[0].upper()}{judgement.word[1:]}{', in part' * judgement.in_part}.**",
                          judgement.note, f"Not measured: {judgement.missing}" if judgement.missing else ""))), ""]
            lines += [f"- {q.text}" + ("" if q.bound is None else f" → {q.word}") for q in judgement.quantities]
            if pictures:
                lines += ["", f"![{TITLES[letter]}](claims-{group.name}/{letter}.svg)"]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"
