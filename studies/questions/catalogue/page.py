"""The catalogue as one HTML page of what was measured, and as the page of the documentation.

    html = page(found)                                        # {model: Found}
    text = manual({"logit_lens": "catalogue/logit_lens.svg"})
"""

from __future__ import annotations

import html
from collections.abc import Mapping

from studies.questions.catalogue.entries import ENTRIES
from studies.questions.catalogue.entries.entry import FAMILIES, CatalogueEntry
from studies.questions.catalogue.figures import drawn
from studies.questions.catalogue.measure import Found

PARTS = ("formula", "range", "meaning", "pitfall", "null", "source")


def page(found: Mapping[str, Found]) -> str:
    """One page that needs no network: each measurement with a panel per model, and what each model cannot give."""
    parts, first = [], True
    for family in FAMILIES:
        parts.append(f"<h2>{family}</h2>")
        for entry in ENTRIES.values():
            if entry.family != family or not any(entry.key in one.seconds for one in found.values()):
                continue
            parts.append(f"<h3 id='{entry.key}'>{html.escape(entry.name)}</h3>{_told(entry)}")
            there = {name: one.measured[entry.key] for name, one in found.items() if entry.key in one.measured}
            if there:
                parts.append(drawn(entry, there).to_html(full_html=False, include_plotlyjs=first,
                                                         div_id=f"of-{entry.key}", config={"displaylogo": False}))
                first = False
            reasons: dict[str, list[str]] = {}
            for name, one in found.items():
                if entry.key in one.missing:
                    reasons.setdefault(one.missing[entry.key], []).append(name)
            parts.extend(f"<p class='missing'>Missing of {html.escape(', '.join(names))}: {html.escape(reason)}</p>"
                         for reason, names in reasons.items())
    models = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(one.about)}; {len(one.measured)} measurements, "
        f"{len(one.missing)} missing, {sum(one.seconds.values()):.0f} s</li>" for name, one in found.items())
    return _PAGE.format(models=models, parts="\n".join(parts))


def manual(figures: Mapping[str, str]) -> str:
    """The documentation's list of measurements, in Markdown: what each is, and a figure where there is one."""
    parts = []
    for family in FAMILIES:
        parts.append(f"## {family}\n")
        for entry in ENTRIES.values():
            if entry.family != family:
                continue
            lines = [f"### {entry.name} (`{entry.key}`)\n"]
            lines += [f"- **{part.capitalize()}**: {_sentence(getattr(entry, part))}" for part in PARTS
                      if getattr(entry, part)]
            if entry.loops > 1:
                lines.append(f"- **Needs**: {entry.loops} loops in one run.")
            if entry.key in figures:
                lines.append(f"\n![{entry.name}]({figures[entry.key]})")
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _told(entry: CatalogueEntry) -> str:
    rows = "".join(f"<dt>{part}</dt><dd>{html.escape(getattr(entry, part))}</dd>"
                   for part in PARTS if getattr(entry, part))
    return f"<dl>{rows}</dl>"


def _sentence(text: str) -> str:
    escaped = text.replace("*", "\\*").replace("_", "\\_").replace("|", "\\|")
    return escaped if escaped.endswith(".") else escaped + "."


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>LoopScope: the measurement catalogue</title>
<style>body{{font:15px/1.45 system-ui,sans-serif;max-width:1360px;margin:2em auto;padding:0 1em;color:#222}}
dl{{display:grid;grid-template-columns:6em 1fr;gap:.1em .8em;font-size:.9em;max-width:60em}}
dt{{color:#666}}dd{{margin:0}}
h3{{margin-top:2em;border-top:1px solid #ddd;padding-top:.6em}}.missing{{color:#8a5a00;font-size:.85em;margin:.1em 0}}
</style><h1>The measurement catalogue</h1><p>Bands and whiskers: 95% intervals over examples. Dashed: the null.</p>
<ul>{models}</ul>{parts}</html>
"""
