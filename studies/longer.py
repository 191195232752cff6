"""Can a model fill more rows of an automaton than it was trained on, if it may loop more? Writes results/longer-….

    python studies/longer.py                               # the zoo's automaton triplets, all seeds
    python studies/longer.py --rows 8 12 16 --loops 8 32

Rotary positions have no last one, so a trained network takes longer sequences as it is. Each free row
follows from the row before, so a loop that applied the rule once more would go on for as long as it is asked to.
What is measured is the share of cells right in each row, and of whole examples, by number of rows and loops.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import xarray as xr
from tqdm import tqdm

from hooks import HookedLoopMDM
from probes.measurement import measurement
from studies.checks import at_least
from studies.claims_report import NAMES
from studies.compute import find_groups
from studies.longer_report import figure, report, words
from studies.results import RESULTS, provenance, write_results
from studies.tasks import Automaton
from studies.zoo import ZOO, Entry


@dataclass(frozen=True)
class Longer:
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


def lengthened(entry: Entry, seq_len: int) -> HookedLoopMDM:
    """The same weights for sequences of up to ``seq_len``. ValueError where positions are learned, one by one."""
    if entry.model.config.position != "rotary":
        raise ValueError(f"{entry.name} has learned positions, none beyond {entry.model.config.max_seq_len}: only "
                         "rotary models can be lengthened.")
    config = replace(entry.model.config, max_seq_len=max(seq_len, entry.model.config.max_seq_len))
    return HookedLoopMDM.from_pretrained(entry.path, config=config)


@torch.no_grad()
def measure(entry: Entry, rows: int, n_loops: int, *, examples: int, seed: int) -> tuple[np.ndarray, float]:
    """Share of cells right in each of ``rows`` rows (NaN for the given one), and of examples right, all masked."""
    assert isinstance(entry.task, Automaton)
    task = replace(entry.task, rows=rows)
    model = lengthened(entry, task.seq_len)
    batch = task.sample(examples, seed=seed, split="test")
    predicted = model(batch.tokens.masked_fill(batch.free, task.mask_token_id), n_loops, t=1.0).argmax(-1)
    right = ((predicted == batch.tokens).float().masked_fill(~batch.free, torch.nan)
             .view(examples, rows, task.width).nanmean((0, 2)))
    return right.numpy(), float(task.score(predicted, batch)["exact"].mean())


def curves(seeds: dict[int, dict[str, Entry]], args: Longer) -> xr.Dataset:
    """kind × seed × n_rows × n_loops (× row); NaN where a kind does not loop."""
    kinds = [kind for kind in NAMES if all(kind in models for models in seeds.values())]
    shape = len(kinds), len(seeds), len(args.rows), len(args.loops)
    cells, exact = np.full((*shape, max(args.rows)), np.nan), np.full(shape, np.nan)
    cases = [(i, kind, j, seed, k, rows) for i, kind in enumerate(kinds) for j, seed in enumerate(seeds)
             for k, rows in enumerate(args.rows)]
    for i, kind, j, seed, k, rows in tqdm(cases, desc="longer", disable=None):
        for m, n_loops in enumerate(args.loops if kind == "loop" else args.loops[:1]):
            by_row, exact[i, j, k, m] = measure(seeds[seed][kind], rows, n_loops if kind == "loop" else 1,
                                                examples=args.examples, seed=args.seed)
            cells[i, j, k, m, :rows] = by_row
    coords: dict[Any, Any] = {"kind": kinds, "seed": list(seeds), "n_rows": list(args.rows),
                              "n_loops": list(args.loops), "row": np.arange(max(args.rows))}
    dims = ("kind", "seed", "n_rows", "n_loops")
    text = "every free cell masked, one forward; twins run once, whatever n_loops says first"
    return xr.Dataset({
        "cells": measurement(cells, (*dims, "row"), units="probability", coords=coords, source="2605.26106",
                             long_name="cells right, by row", definition=text),
        "exact": measurement(exact, dims, units="probability", source="2605.26106", definition=text,
                             coords={key: value for key, value in coords.items() if key != "row"},
                             long_name="examples right")})


def main(args: Longer) -> int:
    """Run the study; 2 if the zoo has no such models."""
    began = time.monotonic()
    seeds = find_groups(args.zoo).get(args.group)
    if not seeds or not isinstance(next(iter(seeds.values()))["loop"].task, Automaton):
        print(f"no automaton LoopMDM and twin called {args.group!r} are in {args.zoo}: train them with "
              "`python studies/pretrain.py --preset automaton`.", file=sys.stderr)
        return 2
    entries = [entry for models in seeds.values() for entry in models.values()]
    task = entries[0].task
    assert isinstance(task, Automaton)
    data = curves(seeds, args)
    said = words(data, task.rows)
    verdict = {"more_rows": list(args.rows), "words": said, "task": task.to_dict(),
               "entries": [entry.name for entry in entries],
               "provenance": provenance(args, entries, seconds=time.monotonic() - began)}
    folder = write_results(args.results / f"longer-{args.group}", verdict=verdict, datasets={"curves": data},
                           html=report(verdict, data))
    if args.pictures:
        figure(data).write_image(folder / "rows.svg")
    print(f"{said}\nWritten to {folder} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Longer, description=__doc__)))
