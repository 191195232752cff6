"""Can a model fill more rows of an automaton than it was trained on, if it may loop more? Writes results/longer-….

    python studies/longer.py                               # the zoo's automaton triplets, all seeds
    python studies/longer.py --rows 8 12 16 --loops 8 32

Rotary positions have no last one, so a trained network takes longer sequences as it is. Each free row
follows from the row before, so a loop that applied the rule once more would go on for as long as it is asked to.
What is measured is the share of cells right in each row, and of whole examples, by number of rows and loops.
"""

from __future__ import annotations

import html
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
import tyro
import xarray as xr
from tqdm import tqdm

from hooks import HookedLoopMDM
from probes.measurement import measurement
from studies.claims_report import NAMES
from studies.compute import find_groups
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


def best_loops(data: xr.Dataset) -> xr.Dataset:
    """Each kind at the number of loops that serves it best on each number of rows, by cells right on average."""
    quality = data.cells.mean(["row", "seed"])
    return data.isel(n_loops=quality.fillna(-1).argmax("n_loops"))


def words(data: xr.Dataset, trained: int) -> str:
    """One sentence per kind: cells and examples right at the trained length and at the others."""
    best, sentences = best_loops(data).mean("seed"), []
    for kind in data.kind.values:
        of_kind = best.sel(kind=kind)
        parts = [f"{rows} rows {100 * float(of_kind.cells.sel(n_rows=rows).mean()):.0f}% of cells and "
                 f"{100 * float(of_kind.exact.sel(n_rows=rows)):.0f}% of examples" for rows in data.n_rows.values]
        sentences.append(f"{NAMES[str(kind)]}: {', '.join(parts)}.")
    return f"Trained on {trained} rows, a coin gets half of the cells. " + " ".join(sentences)


def figure(data: xr.Dataset) -> go.Figure:
    """Cells right by row: one line per number of rows, the LoopMDM solid, the deep twin dotted."""
    drawn, best = go.Figure(), best_loops(data).mean("seed")
    shades = ["#000000", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#009E73"]
    for kind, dash in (("loop", "solid"), ("deep", "dot")):
        for rows, colour in zip(data.n_rows.values if kind in data.kind else [], shades, strict=False):
            values = best.cells.sel(kind=kind, n_rows=rows)
            drawn.add_scatter(x=values.row.values[1:rows] + 1, y=values.values[1:rows], mode="lines+markers",
                              name=f"{NAMES[kind]}, {rows} rows", line={"dash": dash, "color": colour})
    drawn.add_hline(y=0.5, line={"color": "grey", "dash": "dash"}, annotation_text="a coin")
    drawn.update_layout(template="plotly_white", width=820, height=420, margin={"l": 70, "r": 30, "t": 30, "b": 60})
    drawn.update_xaxes(title_text="row (the first is given)", dtick=1)
    drawn.update_yaxes(title_text="cells right, all masked", range=[0.4, 1.02])
    return drawn


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
    page = (f"<!doctype html><meta charset='utf-8'><title>LoopScope: more rows</title><body style='font-family:"
            f"sans-serif;max-width:860px;margin:2em auto'><h1>More rows than in training</h1><p>{html.escape(said)}</p>"
            f"<p>Each model at the number of loops that serves it best, out of {', '.join(map(str, args.loops))}.</p>"
            f"{figure(data).to_html(full_html=False, include_plotlyjs='cdn')}</body>")
    folder = write_results(args.results / f"longer-{args.group}", verdict=verdict, datasets={"curves": data}, html=page)
    if args.pictures:
        figure(data).write_image(folder / "rows.svg")
    print(f"{said}\nWritten to {folder} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Longer, description=__doc__)))
