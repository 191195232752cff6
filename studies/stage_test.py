"""Do the loops re-run the same stages? The stage test on every looped model of the zoo, its controls, and others.

    python studies/stage_test.py                              # everything; what was tested before is not tested again
    python studies/stage_test.py --groups automaton stories   # some tasks
    python studies/stage_test.py --workers 1 --per-level 16   # fewer examples, in one process

Subjects are the LoopMDMs of each task (all training seeds together), their deep twins cut into pseudo-loops, two
blocks built to run AAAA and ABCD, untrained models, and looped models that nobody here made. Each is judged at three
noise levels (deep twins and ablations at the first), and the LoopMDMs also at loops far beyond training. Every verdict
is kept in runs/stage_test as soon as it is there; a run that is killed goes on from them. Writes results/stage_test/:
verdict.json, measurements.nc, report.html and matrices.svg.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from studies.checks import at_least, noise_level, writable
from studies.questions.controls.codec_files import CODECS
from studies.questions.stage_test.figures import dataset, figures
from studies.questions.stage_test.judge import judge, read_calibration, summary_text
from studies.questions.stage_test.measure import Settings, measure
from studies.questions.stage_test.others import other_subjects
from studies.questions.stage_test.page import page
from studies.questions.stage_test.subjects import (
    LEVELS,
    Subject,
    chosen_subjects,
    codec_subjects,
    untrained_subjects,
    zoo_subjects,
)
from studies.results import RESULTS, provenance, write_results
from studies.zoo import ZOO, load_whole


@dataclass(frozen=True)
class StageTest:
    """Ask the headline question of all looped models."""

    groups: tuple[str, ...] = ()
    """Tasks (and variants) of the zoo; all by default."""
    per_level: int = 24
    """Held-out examples at each of the noise levels, for each training seed."""
    t: tuple[float, ...] = LEVELS
    """Noise levels, above 0 and at most 1, each judged apart; the first is the main one."""
    untrained: int = 2
    """Untrained initialisations of the shape of each task's model."""
    seed: int = 0
    """Seed of examples, masks, fits and resampling."""
    workers: int = 2
    """Processes; each works with one thread."""
    pictures: bool = True
    """Write matrices.svg too (it needs Chromium or Chrome)."""
    zoo: Path = ZOO
    """Where the models are."""
    codecs: Path = CODECS
    """Where the controls are."""
    specimens: Path = Path("runs/specimens")
    """Where pretrained models were downloaded to."""
    runs: Path = Path("runs")
    """Where verdicts are kept while they are made."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        at_least(8, per_level=self.per_level)
        at_least(1, levels=len(self.t))
        for level in self.t:
            noise_level(level)
        at_least(1, workers=self.workers)
        at_least(0, untrained=self.untrained)


def subjects(args: StageTest) -> list[Subject]:
    """What is tested. ValueError for groups that are not in the zoo, or if there is nothing."""
    chosen = chosen_subjects(zoo_subjects(args.zoo), args.zoo, args.groups)
    others, missing = other_subjects(args.specimens)
    for name, how in missing.items() if not args.groups else ():
        print(f"{name} is left out: {how}.", file=sys.stderr)
    return [*codec_subjects(args.codecs), *chosen, *(() if args.groups else others),
            *untrained_subjects(args.zoo, n=args.untrained, groups=args.groups)]


def main(args: StageTest) -> int:
    """Run the study; 2 if there is nothing to test or the results cannot be written."""
    began = time.monotonic()
    try:
        todo = subjects(args)
        writable(args.results)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    settings = Settings(per_level=args.per_level, levels=args.t, seed=args.seed)
    found = measure(todo, settings, kept=args.runs / "stage_test", workers=args.workers)
    verdict = judge(found, calibration=read_calibration(args.results))
    entries = load_whole(args.zoo / name for subject in todo for name in subject.entries).values()
    verdict["found"] = found
    verdict["provenance"] = provenance(args, entries, seconds=sum(told["seconds"] for told in found.values()))
    drawn = figures(found, verdict["main"])
    print(summary_text(verdict))
    folder = write_results(args.results / "stage_test", study="stage_test", verdict=verdict, html=page(verdict, drawn),
                           datasets={key: dataset(told) for key, told in found.items()})
    if args.pictures and "matrices" in drawn:
        drawn["matrices"][2].write_image(folder / "matrices.svg")
    print(f"\nWritten to {folder} after {time.monotonic() - began:.0f} s: verdict.json, measurements.nc, report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(StageTest, description=__doc__)))
