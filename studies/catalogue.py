"""The measurement catalogue: everything that can be measured on a model, on one page.

    python studies/catalogue.py --model automaton-loop automaton-twin           # models of the zoo
    python studies/catalogue.py --model ALBERT HRM-Text AntiBERTy               # looped models of other makers
    python studies/catalogue.py --model path/or/hub-id --tokens clean.npy       # one's own LoopMDM
    python studies/catalogue.py --only causal_scan head_scan                    # some measurements

By default the LoopMDM, the twin and the deep twin of automaton, sudoku and text. What a model cannot give is named on
the page with the reason. Every measurement is kept in runs/catalogue as soon as it is made; a run that is stopped goes
on from there. docs/catalogue.md says what each measurement is. Writes to results/catalogue: page.html, and one
measurements.nc per model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from plotly.io import write_images

from hooks.writing import written_whole
from studies.checks import at_least, noise_level, writable
from studies.questions.catalogue.entries import ENTRIES
from studies.questions.catalogue.figures import drawn
from studies.questions.catalogue.measure import Asked, Found, measure
from studies.questions.catalogue.page import page
from studies.questions.catalogue.subjects import measurable
from studies.results import RESULTS
from studies.zoo import ZOO

TRIPLETS = tuple(f"{task}-{kind}{variant}" for task, variant in
                 (("automaton", ""), ("sudoku", "-6x6"), ("text", "-chars")) for kind in ("loop", "twin", "deep"))


@dataclass(frozen=True)
class Catalogue:
    """Measure everything that a model allows."""

    model: tuple[str, ...] = TRIPLETS
    """Names of the zoo, ALBERT, HRM-Text, AntiBERTy, SmolLM2, or with --tokens a folder or hub id of a LoopMDM."""
    only: tuple[str, ...] = ()
    """Some entries of the catalogue, by key; all by default."""
    leave_out: tuple[str, ...] = ()
    """Entries that are not made, such as tuned_lens and jacobian_lens for a large vocabulary."""
    tokens: Path | None = None
    """Clean tokens, [example, pos] in a .npy file, for models that are not in the zoo."""
    examples: int = 16
    """Held-out examples."""
    t: float = 0.9
    """Noise level of models that denoise, above 0 and at most 1."""
    n_loops: int = 4
    """Loops in one forward, of LoopMDMs."""
    seed: int = 0
    """Seed of examples, masks, fits and resampling."""
    workers: int = 2
    """Processes; each works with one thread."""
    pictures: bool = False
    """Write figures/KEY.svg of each measurement too (it needs Chromium or Chrome)."""
    zoo: Path = ZOO
    """Where the models are."""
    specimens: Path = Path("runs/specimens")
    """Where pretrained models were downloaded to."""
    runs: Path = Path("runs")
    """Where measurements are kept while they are made."""
    results: Path = RESULTS
    """Where the page goes: its folder catalogue."""

    def __post_init__(self) -> None:
        at_least(5, examples=self.examples)
        at_least(1, n_loops=self.n_loops, workers=self.workers, models=len(self.model))
        noise_level(self.t)
        if unknown := sorted({*self.only, *self.leave_out} - set(ENTRIES)):
            raise ValueError(f"no measurement is called {', '.join(unknown)}; there are {', '.join(ENTRIES)}.")


def main(args: Catalogue) -> int:
    """Measure and write; 2 if a model is not there or the results cannot be written."""
    began = time.monotonic()
    entries = [key for key in ENTRIES if (not args.only or key in args.only) and key not in args.leave_out]
    try:
        todo = measurable(args.model, tokens=args.tokens, zoo=args.zoo, specimens=args.specimens)
        writable(args.results)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    found = measure(todo, Asked(args.examples, args.t, args.n_loops, args.seed), kept=args.runs / "catalogue",
                    entries=entries, workers=args.workers)
    folder = args.results / "catalogue"
    with written_whole(folder / "page.html") as temporary:
        temporary.write_text(page(found))
    if args.pictures:
        _draw(found, folder / "figures")
    for name, one in found.items():
        with written_whole(folder / name / "measurements.nc") as temporary:
            _write(one, temporary)
        print(f"{name}: {len(one.measured)} measurements in {sum(one.seconds.values()):.0f} s"
              + (f"; missing: {', '.join(one.missing)}" if one.missing else ""))
    print(f"\nWritten to {folder} after {time.monotonic() - began:.0f} s: page.html, and measurements.nc of each "
          "model.")
    return 0


def _draw(found: Mapping[str, Found], folder: Path) -> None:
    there = {key: {name: one.measured[key] for name, one in found.items() if key in one.measured} for key in ENTRIES}
    figures = {key: drawn(ENTRIES[key], of_models) for key, of_models in there.items() if of_models}
    with written_whole(folder) as temporary:
        temporary.mkdir()
        write_images(list(figures.values()), [temporary / f"{key}.svg" for key in figures],       # by one browser
                     width=[figure.layout.width for figure in figures.values()],
                     height=[figure.layout.height for figure in figures.values()])


def _write(found: Found, file: Path) -> None:
    for number, (key, values) in enumerate(found.measured.items()):
        values.to_netcdf(file, mode="a" if number else "w", group=key, engine="h5netcdf")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Catalogue, description=__doc__)))
