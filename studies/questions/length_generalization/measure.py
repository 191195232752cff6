"""What is measured of more rows than in training: cells right in each row, and whole examples, by rows and loops.

    curves = measure(seeds, rows=(8, 12), loops=(8, 16), examples=128, seed=0)
    curves.cells, curves.exact
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from hooks import HookedLoopMDM
from probes.measurement import measurement
from studies.tasks import Automaton
from studies.zoo import SHORT_NAMES, Entry


def measure(seeds: Mapping[int, Mapping[str, Entry]], *, rows: Sequence[int], loops: Sequence[int], examples: int,
            seed: int) -> xr.Dataset:
    """``cells`` (kind, seed, n_rows, n_loops, row) and ``exact`` without rows; NaN where a kind does not loop.

    ``seeds`` holds the models by seed of training and kind; ``seed`` is that of the examples.
    """
    kinds = [kind for kind in SHORT_NAMES if all(kind in models for models in seeds.values())]
    shape = len(kinds), len(seeds), len(rows), len(loops)
    cells, exact = np.full((*shape, max(rows)), np.nan), np.full(shape, np.nan)
    cases = [(i, kind, j, models[kind], k, n) for i, kind in enumerate(kinds)
             for j, models in enumerate(seeds.values()) for k, n in enumerate(rows)]
    for i, kind, j, entry, k, n in tqdm(cases, desc="length generalization", disable=None):
        for m, n_loops in enumerate(loops if kind == "loop" else loops[:1]):
            by_row, exact[i, j, k, m] = measure_entry(entry, n, n_loops if kind == "loop" else 1, examples=examples,
                                                      seed=seed)
            cells[i, j, k, m, :n] = by_row
    coords: dict[Any, Any] = {"kind": kinds, "seed": list(seeds), "n_rows": list(rows),
                              "n_loops": list(loops), "row": np.arange(max(rows))}
    dims = ("kind", "seed", "n_rows", "n_loops")
    text = "every free cell masked, one forward; twins run once, whatever n_loops says first"
    return xr.Dataset({
        "cells": measurement(cells, (*dims, "row"), units="probability", coords=coords, source="2605.26106",
                             long_name="cells right, by row", definition=text),
        "exact": measurement(exact, dims, units="probability", source="2605.26106", definition=text,
                             coords={key: value for key, value in coords.items() if key != "row"},
                             long_name="examples right")})


@torch.no_grad()
def measure_entry(entry: Entry, rows: int, n_loops: int, *, examples: int, seed: int) -> tuple[np.ndarray, float]:
    """Share of cells right in each of ``rows`` rows (NaN for the given one), and of examples right, all masked."""
    assert isinstance(entry.task, Automaton)
    task = replace(entry.task, rows=rows)
    model = lengthened(entry, task.seq_len)
    batch = task.sample(examples, seed=seed, split="test")
    predicted = model(batch.tokens.masked_fill(batch.free, task.mask_token_id), n_loops, t=1.0).argmax(-1)
    right = ((predicted == batch.tokens).float().masked_fill(~batch.free, torch.nan)
             .view(examples, rows, task.width).nanmean((0, 2)))
    return right.numpy(), float(task.score(predicted, batch)["exact"].mean())


def lengthened(entry: Entry, seq_len: int) -> HookedLoopMDM:
    """The same weights for sequences of up to ``seq_len``. ValueError where positions are learned, one by one."""
    if entry.model.config.position != "rotary":
        raise ValueError(f"{entry.name} has learned positions, none beyond {entry.model.config.max_seq_len}: only "
                         "rotary models can be lengthened.")
    config = replace(entry.model.config, max_seq_len=max(seq_len, entry.model.config.max_seq_len))
    return HookedLoopMDM.from_pretrained(entry.path, config=config)
