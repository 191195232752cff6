"""The generated parts of README.md and of docs/ (zoo, neighbours, catalogue), from what is bundled.

    python studies/readme.py            # rewrite them between their markers
    python studies/readme.py --check    # say whether they are up to date; exit status 1 if not
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from hooks.writing import written_whole
from studies.questions.catalogue.page import manual
from studies.questions.length_generalization.judge import judge as more_rows
from studies.results import RESULTS, read_results
from studies.zoo import KINDS, ZOO, names, read_card, read_metrics

ROOT = Path(__file__).resolve().parent.parent
README, ZOO_PAGE, NEIGHBOURS, CATALOGUE = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "zoo", "neighbours", "catalogue")))


@dataclass(frozen=True)
class Readme:
    """Rewrite the generated parts of README.md and of the pages under docs/."""

    check: bool = False
    """Only say whether they are up to date."""


def verdict_block(verdict: dict[str, Any]) -> str:
    """The answer of the stage test, its sentences, and the figure of its matrices."""
    return "\n".join([f"**{verdict['answer']}**", "", "![Could another loop have done this loop's work?]"
                      "(results/stage_test/matrices.svg)", "", *(f"- {sentence}" for sentence in verdict["words"])])


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


def unlearned_block(zoo: Path = ZOO) -> str:
    """Where loops do not pay: text in either form, and more rows than in training."""
    cards = {name: read_card(zoo / name) for name in names(zoo)}
    loop, twin = (read_metrics(zoo / f"text-{kind}") for kind in ("loop", "twin"))
    steps = int(min(table.step.max() for table in (loop, twin)))
    at = [float(np.interp(steps, table.step, table.nelbo)) for table in (loop, twin)]
    text = (f"- On *text* in words the LoopMDM, trained with S drawn uniformly from the first step, ends with a NELBO "
            f"of {cards['text-loop']['metrics']['nelbo']:.2f} and its twin, after equal FLOPs, with "
            f"{cards['text-twin']['metrics']['nelbo']:.2f} (after {steps:,} steps {at[0]:.2f} and {at[1]:.2f}).")
    chars = {kind: cards[f"text-{kind}-chars"]["metrics"] for kind in KINDS}
    curve = ", ".join(f"{chars['loop'][f'nelbo@{s}']:.3f} at S = {s}" for s in (1, 4, 8))
    bytes_ = (f"- On *text* in bytes (grown S, exact masks) the loops are used and do not pay: NELBO {curve}, where a "
              f"straight line through the first states has {chars['loop']['nelbo_line@8']:.3f} at S = 8; the twin has "
              f"{chars['twin']['nelbo']:.3f} and the deep twin {chars['deep']['nelbo']:.3f} after equal FLOPs.")
    longer = read_results(RESULTS / "length_generalization-automaton")
    said = more_rows(longer.datasets["curves"], longer.verdict["task"]["rows"])
    rows = ("- An automaton model does not fill more rows than in training, however many loops it may use. "
            f"{said} ([figure](../results/length_generalization-automaton/report.html), "
            "`python studies/length_generalization.py`)")
    return "\n".join([text, bytes_, rows])


def question_block(study: str, picture: str) -> str:
    """The sentences of a study, and a figure of it."""
    verdict = read_results(RESULTS / study).verdict
    return "\n".join([*(f"- {sentence}" for sentence in verdict["words"]), "",
                      f"![{verdict['question']}](../results/{study}/{picture}.svg)"])


def catalogue_block(results: Path = RESULTS) -> str:
    """What each measurement is, with the figure that is bundled."""
    figures = results / "catalogue" / "figures"
    return manual({file.stem: f"../results/catalogue/figures/{file.name}" for file in sorted(figures.glob("*.svg"))})


def between(text: str, name: str, block: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced. ValueError if they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the text lacks the markers {begin} and {end}: put them where the {name} table belongs.")
    return f"{before}{begin}\n{block}\n{end}{after}"


def current() -> dict[Path, str]:
    """The files as they should be."""
    verdict = read_results(RESULTS / "stage_test").verdict
    zoo = between(ZOO_PAGE.read_text(), "zoo", zoo_block())
    asked = between(NEIGHBOURS.read_text(), "loops_and_steps", question_block("loops_and_steps", "restart"))
    return {README: between(README.read_text(), "verdict", verdict_block(verdict)),
            ZOO_PAGE: between(zoo, "unlearned", unlearned_block()),
            NEIGHBOURS: between(asked, "noise_level", question_block("noise_level", "read")),
            CATALOGUE: between(CATALOGUE.read_text(), "catalogue", catalogue_block())}


def main(args: Readme) -> int:
    """Rewrite or check."""
    stale = {path: text for path, text in current().items() if text != path.read_text()}
    if args.check:
        listed = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"Not up to date: {listed}. Run `python studies/readme.py`." if stale else "Up to date.")
        return 1 if stale else 0
    for path, text in stale.items():
        with written_whole(path) as temporary:
            temporary.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Readme, description=__doc__)))
