"""Can a model fill more rows of an automaton than it was trained on, if it may loop more?

    python studies/length_generalization.py                               # the zoo's automaton triplets, all seeds
    python studies/length_generalization.py --rows 8 12 16 --loops 8 32

Rotary positions have no last one, so a trained network takes longer sequences as it is. Each free row
follows from the row before, so a loop that applied the rule once more would go on for as long as it is asked to.
What is measured is the share of cells right in each row, and of whole examples, by number of rows and loops.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from studies.checks import at_least, writable
from studies.questions.length_generalization.figures import rows_figure
from studies.questions.length_generalization.judge import judge
from studies.questions.length_generalization.measure import measure
from studies.questions.length_generalization.page import page
from studies.results import RESULTS, provenance, write_results
from studies.tasks import Automaton
from studies.zoo import ZOO, find_groups


@dataclass(frozen=True)
class LengthGeneralization:
    """Test automaton models on more rows than they were trained on."""

    group: str = "automaton"
    """Task and variant, without the seed."""
    rows: tuple[int, ...] = (8, 9, 10, 12, 16)
    """Rows to fill, the given one included."""
    loops: tuple[int, ...] = (4, 8, 16, 32)
    """Loops of the LoopMDM; the twins run once."""
    examples: int = 128
    """Held-out examples of each length."""
    seed: int = 0
    """Of the examples."""
    pictures: bool = True
    """Write the figure as an SVG file, too."""
    zoo: Path = ZOO
    """Where the models are."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        if not self.rows or not self.loops:
            raise ValueError("rows and loops must name at least one number each.")
        at_least(2, rows=min(self.rows))   # the first one is given
        at_least(1, loops=min(self.loops), examples=self.examples)


def main(args: LengthGeneralization) -> int:
    """Run the study; 2 if the zoo has no such models, or the results cannot be written."""
    try:
        writable(args.results)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    began = time.monotonic()
    seeds = find_groups(args.zoo).get(args.group)
    if not seeds or not isinstance(next(iter(seeds.values()))["loop"].task, Automaton):
        print(f"no automaton LoopMDM and twin called {args.group!r} are in {args.zoo}: train them with "
              "`python studies/pretrain.py --preset automaton`.", file=sys.stderr)
        return 2
    entries = [entry for models in seeds.values() for entry in models.values()]
    task = entries[0].task
    assert isinstance(task, Automaton)
    data = measure(seeds, rows=args.rows, loops=args.loops, examples=args.examples, seed=args.seed)
    said = judge(data, task.rows)
    verdict = {"more_rows": list(args.rows), "words": said, "task": task.to_dict(),
               "entries": [entry.name for entry in entries],
               "provenance": provenance(args, entries, seconds=time.monotonic() - began)}
    folder = write_results(args.results / f"length_generalization-{args.group}", study="length_generalization",
                           verdict=verdict, datasets={"curves": data}, html=page(verdict, data))
    if args.pictures:
        rows_figure(data).write_image(folder / "rows.svg")
    print(f"{said}\nWritten to {folder} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LengthGeneralization, description=__doc__)))
