"""The generated parts of README.md and docs/zoo.md, made from what is bundled: results/ and the cards of zoo/.

    python studies/readme.py            # rewrite both between their markers
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
from studies.questions.length_generalization.judge import judge as more_rows
from studies.questions.stages.judge import notes
from studies.results import RESULTS, read_results
from studies.zoo import KINDS, SHORT_NAMES, ZOO, names, read_card, read_metrics

ROOT = Path(__file__).resolve().parent.parent
README, ZOO_PAGE = ROOT / "README.md", ROOT / "docs" / "zoo.md"


@dataclass(frozen=True)
class Readme:
    """Rewrite the generated parts of README.md and docs/zoo.md."""

    check: bool = False
    """Only say whether they are up to date."""


def verdict_block(verdict: dict[str, Any]) -> str:
    """The findings in words, and what their brackets hold."""
    setting = verdict["setting"]
    note = " ".join([f"On *{setting['task']['name']}*, noise level {setting['t']:g}, {setting['n_loops']} loops.",
                     *notes({**verdict, "table": []}), verdict.get("over_seeds", "")])
    return "\n\n".join([f"**{verdict['conclusion']}**", verdict["content"]["words"], verdict["operation"]["words"],
                        note.strip()])


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
    """What the bundled models did not learn: text, pointer chains, and more rows than in training."""
    cards = {name: read_card(zoo / name) for name in names(zoo)}
    loop, twin = (read_metrics(zoo / f"text-{kind}") for kind in ("loop", "twin"))
    steps = int(min(table.step.max() for table in (loop, twin)))
    at = [float(np.interp(steps, table.step, table.nelbo)) for table in (loop, twin)]
    text = (f"- On *text* the LoopMDM ends with a NELBO of {cards['text-loop']['metrics']['nelbo']:.2f} and its twin, "
            f"after equal FLOPs, with {cards['text-twin']['metrics']['nelbo']:.2f}. It is behind at equal steps too: "
            f"{at[0]:.2f} against {at[1]:.2f} after {steps:,}; the twin's learning rate is higher there. "
            "The reason is open.")
    pointer = {kind: cards[f"pointer-{kind}"] for kind in KINDS}
    keys = pointer["loop"]["task"]["keys"]
    filled = ", ".join(f"{SHORT_NAMES[kind]} {_cells(card):.1%}" for kind, card in pointer.items())
    nelbo = ", ".join(f"{SHORT_NAMES[kind]} {card['metrics']['nelbo']:.2f}" for kind, card in pointer.items())
    hops = (f"- *Pointer* is a negative result. All kinds fill wholly masked chains at chance, 1 of {keys - 1} "
            f"({filled}), and have only learned to use what is visible (NELBO: {nelbo}). A single hop (`hops=1`) does "
            "begin to be learned.")
    longer = read_results(RESULTS / "length_generalization-automaton")
    said = more_rows(longer.datasets["curves"], longer.verdict["task"]["rows"])
    rows = ("- An automaton model does not fill more rows than in training, however many loops it may use. "
            f"{said} ([figure](../results/length_generalization-automaton/report.html), "
            "`python studies/length_generalization.py`)")
    return "\n".join([text, hops, rows])


def _cells(card: dict[str, Any]) -> float:
    """Free cells right at S_max."""
    return float(card["metrics"][f"cells@{card['topology']['max_loops']}"])


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
    verdict = read_results(RESULTS / "rerun-automaton").verdict
    zoo = between(ZOO_PAGE.read_text(), "zoo", zoo_block())
    return {README: between(README.read_text(), "verdict", verdict_block(verdict)),
            ZOO_PAGE: between(zoo, "unlearned", unlearned_block())}


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
