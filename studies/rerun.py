"""What is alike from loop to loop, and does the content advance? Two halves of the headline question.

    python studies/rerun.py                                # the bundled automaton triplets, all seeds
    python studies/rerun.py --variants "" --examples 512   # the first seed alone, with more examples
    python studies/rerun.py --loops 8                      # compare eight loops instead of equal depth

Takes triplets from the zoo: the LoopMDM, its unlooped twin, and the deep twin, whose layers
are cut into pseudo-loops (they share no weights, so nothing is forced to repeat). Untrained
LoopMDMs of the same shape show what weight sharing alone makes similar, and how far that
differs from one initialisation to the next. The half on the operation is a description: no
statistic here tells weight sharing from a repeated operation. The half on the content is
decided, by rules with a smallest effect (see studies/questions/stages/judge.py).

Prints a table and the findings in words, and writes results/rerun-<task>/: verdict.json,
measurements.nc and a self-contained report.html. The first variant carries the report; the
others say whether it holds over seeds.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import xarray as xr

from studies.checks import at_least, noise_level
from studies.questions.stages import content as content_half
from studies.questions.stages import operation as operation_half
from studies.questions.stages.judge import add_seeds, judge, summary_text
from studies.questions.stages.page import page
from studies.results import RESULTS, provenance, write_results
from studies.zoo import ZOO, Entry, triplet, variants_of


@dataclass(frozen=True)
class Rerun:
    """Ask the headline question of a task's triplets."""

    task: str = "automaton"
    """Task of the triplets in the zoo."""
    variants: tuple[str, ...] | None = None
    """Variants of the triplet ("" is the first seed, s1 the second); all whole ones by default."""
    loops: int | None = None
    """Loops that are compared; by default as many as the deep twin has pseudo-loops (equal depth)."""
    examples: int = 192
    """Held-out examples; intervals come from resampling them."""
    t: float = 1.0
    """Noise level, above 0 and at most 1: the share of free positions that is masked."""
    untrained: int = 8
    """Untrained initialisations beside the trained model."""
    seed: int = 0
    """Seed of examples, masks, probes and resampling."""
    zoo: Path = ZOO
    """Where the models are."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        noise_level(self.t)
        at_least(2, examples=self.examples, loops=self.loops, untrained=self.untrained)


def ask(args: Rerun, models: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, xr.Dataset]]:
    """The whole study of one triplet: verdict and measurements."""
    setting = operation_half.Setting.draw(models, n_examples=args.examples, t=args.t, seed=args.seed,
                                           n_untrained=args.untrained, n_loops=args.loops)
    operation = operation_half.measure_operation(setting)
    content = content_half.measure_content(setting)
    return judge(setting, operation, content), {**operation.datasets, **content.datasets}


def main(args: Rerun) -> int:
    """Run the study; 2 if there is no whole triplet."""
    began = time.monotonic()
    variants = variants_of(args.task, args.zoo) if args.variants is None else args.variants
    triplets = {variant: triplet(args.task, variant, args.zoo) for variant in variants}
    for variant, models in triplets.items():
        if missing := {"loop", "twin", "deep"} - set(models):
            print(f"the triplet {args.task} {variant!r} in {args.zoo} lacks {', '.join(sorted(missing))}: "
                  f"train it with `python studies/pretrain.py --preset {args.task}`.", file=sys.stderr)
            return 2
    if not triplets:
        print(f"no whole triplet of {args.task} is in {args.zoo}: "
              f"train one with `python studies/pretrain.py --preset {args.task}`.", file=sys.stderr)
        return 2
    (_, first), *others = triplets.items()
    verdict, datasets = ask(args, first)
    add_seeds(verdict, {variant: ask(args, models)[0] for variant, models in others})
    entries = [entry for models in triplets.values() for entry in models.values()]
    verdict["provenance"] = provenance(args, entries, seconds=time.monotonic() - began)
    folder = write_results(args.results / f"rerun-{args.task}", study="stages", verdict=verdict, datasets=datasets,
                           html=page(verdict, datasets))
    print(summary_text(verdict))
    print(f"\nWritten to {folder} in {time.monotonic() - began:.0f} s: verdict.json, measurements.nc, report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Rerun, description=__doc__)))
