"""Is the noise level decodable where the model is not told it, and does moving along it change what loops do?

    python studies/noise_level.py                             # every task of the zoo, all seeds, and untrained models
    python studies/noise_level.py --groups automaton stories

A masked diffusion model need not be told how much is masked (2607.01774). Here the share that is masked is read from
the state at one masked position, loop by loop, and the state is moved along it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import xarray as xr
from tqdm import tqdm

from hooks import HookedLoopMDM, LoopedModel
from studies.checks import at_least, writable
from studies.questions.noise_level.figures import figures
from studies.questions.noise_level.judge import judge
from studies.questions.noise_level.measure import LEVELS, measure
from studies.questions.noise_level.page import page
from studies.questions.stage_test.measure import needed_loops
from studies.questions.stage_test.subjects import trained_subjects, untrained_model
from studies.results import RESULTS, provenance, write_results
from studies.zoo import ZOO, load_whole


@dataclass(frozen=True)
class NoiseLevel:
    """Read the noise level, and move along it."""

    groups: tuple[str, ...] = ()
    """Tasks (and variants) of the zoo; all by default. Models that are told the noise level are left out."""
    per_level: int = 12
    """Held-out examples at each of ten noise levels, for each training seed."""
    seed: int = 0
    """Of examples, masks, halves, random directions and resampling."""
    pictures: bool = True
    """Write the figures as SVG files, too."""
    zoo: Path = ZOO
    """Where the models are."""
    results: Path = RESULTS
    """Where the results go."""

    def __post_init__(self) -> None:
        at_least(4, per_level=self.per_level)


def main(args: NoiseLevel) -> int:
    """Run the study; 2 if there is nothing to measure or the results cannot be written."""
    began = time.monotonic()
    try:
        writable(args.results)
        todo = trained_subjects(args.zoo, args.groups)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found, sizes, untrained, used = {}, {}, {}, []
    for subject in tqdm(todo, desc="noise level", unit="subject", disable=None):
        models = subject.load()
        if told_the_level(models[0]):
            print(f"{subject.name} is left out: it is told the noise level.", file=sys.stderr)
            continue
        drawn = subject.examples(args.per_level, args.seed, LEVELS)
        n_loops = needed_loops(models, subject.examples(args.per_level, args.seed + 1, (0.9,)))
        each = [measure(model, drawn, n_loops=n_loops, seed=args.seed) for model in models]
        read, moved = (xr.concat(part, "example", coords="minimal", compat="override")
                       for part in zip(*each, strict=True))
        found[subject.name] = read, moved
        sizes[subject.name] = (each[0][0].sizes["example"],) * len(models)
        plain = untrained_model(args.zoo / subject.entries[0], args.seed)
        untrained[subject.name] = measure(plain, drawn, n_loops=n_loops, seed=args.seed)[0]
        used += subject.entries
    if not found:
        print("every model of these groups is told the noise level: there is nothing to measure.", file=sys.stderr)
        return 2
    entries = load_whole(args.zoo / name for name in used).values()
    verdict = {**judge(found, sizes, untrained=untrained, seed=args.seed),
               "provenance": provenance(args, entries, seconds=time.monotonic() - began)}
    drawn_figures = figures(verdict["rows"])
    datasets = {f"{name}-{what}": data.astype(np.float32) for name, parts in found.items()
                for what, data in zip(("read", "moved"), parts, strict=True)}
    folder = write_results(args.results / "noise_level", study="noise_level", verdict=verdict, datasets=datasets,
                           html=page(verdict, drawn_figures))
    if args.pictures:
        for name, (_, _, figure) in drawn_figures.items():
            figure.write_image(folder / f"{name}.svg")
    print("\n".join(verdict["words"]) + f"\nWritten to {folder} in {time.monotonic() - began:.0f} s")
    return 0


def told_the_level(model: LoopedModel) -> bool:
    """Is the model conditioned on the noise level? The zoo's are LoopMDMs, whose configuration says so."""
    return isinstance(model, HookedLoopMDM) and model.config.time_conditioning != "none"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(NoiseLevel, description=__doc__)))
