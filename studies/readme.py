"""The README's tables, made from what is bundled: the verdict from results/, the zoo from its cards.

    python studies/readme.py            # rewrite README.md between its markers
    python studies/readme.py --check    # say whether it is up to date; exit status 1 if not
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from studies.rerun_verdict import cell_text, notes
from studies.results import RESULTS, read_results
from studies.zoo import KINDS, ZOO, names, read_card

README = Path(__file__).resolve().parent.parent / "README.md"
SHOWN = ("within", "between", "ratio", "lost", "accuracy_max", "accuracy_gain", "probe_slope")
"""Rows of the verdict's table that the README repeats."""


@dataclass(frozen=True)
class Readme:
    """Rewrite the README's generated parts."""

    check: bool = False
    """Only say whether they are up to date."""


def verdict_block(verdict: dict[str, Any]) -> str:
    """The findings in words, and the chief rows of their table."""
    subjects = verdict["subjects"]
    lines = ["| measure | " + " | ".join(subjects.values()) + " |", "|---" * (1 + len(subjects)) + "|"]
    shown = [row for row in verdict["table"] if row["key"] in SHOWN]
    for row in shown:
        cells = [cell_text(row.get(s)) for s in subjects]
        lines.append(f"| {row['measure']} | " + " | ".join(cells) + " |")
    setting = verdict["setting"]
    note = " ".join([f"On *{setting['task']['name']}*, noise level {setting['t']:g}, {setting['n_loops']} loops.",
                     *notes({**verdict, "table": shown}), verdict.get("over_seeds", "")])
    return "\n\n".join([f"**{verdict['conclusion']}**", verdict["content"]["words"], verdict["operation"]["words"],
                        "\n".join(lines), note.strip()])


def zoo_block(zoo: Path = ZOO) -> str:
    """One line per checkpoint, from its card."""
    lines = ["| zoo/ | what | parameters | training FLOPs | minutes | cells right, S = 1 → S_max | examples right |",
             "|---|---|---|---|---|---|---|"]
    for name in names(zoo):
        card = read_card(zoo / name)
        s_max = card["topology"]["max_loops"]
        at = ["1", str(s_max)] if s_max > 1 else ["1"]
        cells = " → ".join(f"{card['metrics'][f'cells@{s}']:.3f}" for s in at)
        exact = card["metrics"][f"exact@{s_max}"]
        lines.append(f"| `{name}` | {KINDS[card['kind']]} | {card['parameters']:,} | {card['training']['flops']:.2g} | "
                     f"{card['training']['seconds'] / 60:.0f} | {cells} | {exact:.3f} |")
    lines += ["", "Free positions all masked, filled in one forward, held-out examples. Made from the cards by "
              "`python studies/readme.py`."]
    return "\n".join(lines)


def between(text: str, name: str, block: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced. ValueError if they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the text lacks the markers {begin} and {end}: put them where the {name} table belongs.")
    return f"{before}{begin}\n{block}\n{end}{after}"


def current() -> str:
    """The README as it should be."""
    text = README.read_text()
    text = between(text, "verdict", verdict_block(read_results(RESULTS / "rerun-automaton").verdict))
    return between(text, "zoo", zoo_block())


def main(args: Readme) -> int:
    """Rewrite or check."""
    text = current()
    if args.check:
        fresh = text == README.read_text()
        print("README.md is up to date." if fresh else "README.md is not up to date: run `python studies/readme.py`.")
        return 0 if fresh else 1
    temporary = README.with_suffix(".md.tmp")
    temporary.write_text(text)
    os.replace(temporary, README)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Readme, description=__doc__)))
