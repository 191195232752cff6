"""Does a denoising step continue where the loops of the step before ended, or does it start anew?

    python studies/loops_and_steps.py                         # every task of the zoo, all seeds, and an untrained model
    python studies/loops_and_steps.py --groups automaton stories

Two measurements. The first loop of a step is exchanged with loops of the step before: if it starts anew, the first of
them can do its work, and if it continues, the later ones can. And half of the answers after k loops is written into
the input, which is run afresh with one loop: is that as good as one more loop?
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from studies.checks import at_least, noise_level, writable
from studies.questions.loops_and_steps.figures import figures
from studies.questions.loops_and_steps.judge import judge
from studies.questions.loops_and_steps.measure import measure
from studies.questions.loops_and_steps.page import page
from studies.questions.stage_test.measure import needed_loops
from studies.questions.stage_test.subjects import trained_subjects, untrained_subjects
from studies.results import RESULTS, provenance, write_results
from studies.zoo import ZOO, load_whole


@dataclass(frozen=True)
class LoopsAndSteps:
    """Compare the loops of two denoising steps."""

    groups: tuple[str, ...] = ()
    """Tasks (and variants) of the zoo; all by default."""
    examples: int = 32
    """Held-out examples of each training seed."""
    t: float = 0.9
    """Noise level of the earlier step."""
    share: float = 1 / 3
    """Share of the masked positions that the model fills before the later step."""
    seed: int = 0
    """Of examples, masks and resampling."""
    pictures: bool = True
    """Write the figures as SVG files, too."""
    zoo: Path = ZOO
    """Where the models are."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        at_least(8, examples=self.examples)
        noise_level(self.t)
        if not 0 < self.share < 1:
            raise ValueError(f"share is a part of the masked positions, between 0 and 1, not {self.share:g}.")


def main(args: LoopsAndSteps) -> int:
    """Run the study; 2 if there is nothing to measure or the results cannot be written."""
    began = time.monotonic()
    try:
        writable(args.results)
        untrained = untrained_subjects(args.zoo, n=1, groups=("automaton",))
        todo = [*trained_subjects(args.zoo, args.groups),
                *(replace(subject, name="automaton, untrained") for subject in untrained)]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found, sizes = {}, {}
    for subject in tqdm(todo, desc="loops and steps", unit="subject", disable=None):
        models = subject.load()
        drawn = subject.examples(args.examples, args.seed, (args.t,))
        n_loops = subject.n_loops or needed_loops(models, subject.examples(args.examples, args.seed + 1, (args.t,)))
        found[subject.name] = measure(models, drawn, n_loops=n_loops, share=args.share)
        sizes[subject.name] = (args.examples,) * len(models)
    entries = load_whole(args.zoo / name for subject in todo for name in subject.entries).values()
    verdict = {**judge(found, sizes, seed=args.seed),
               "about": {subject.name: subject.about for subject in todo},
               "provenance": provenance(args, entries, seconds=time.monotonic() - began)}
    drawn_figures = figures(verdict["rows"])
    folder = write_results(args.results / "loops_and_steps", study="loops_and_steps", verdict=verdict,
                           datasets={name.replace(", ", "-").replace(" ", "-"): data.astype(np.float32)
                                     for name, data in found.items()}, html=page(verdict, drawn_figures))
    if args.pictures:
        for name, (_, _, figure) in drawn_figures.items():
            figure.write_image(folder / f"{name}.svg")
    print("\n".join(verdict["words"]) + f"\nWritten to {folder} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LoopsAndSteps, description=__doc__)))
