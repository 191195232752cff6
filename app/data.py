"""Load: checkpoints, examples and results, cached over reruns and sessions.

First of the three stages load → compute → draw. A `Checkpoint` is the cache key of everything
that is computed from a model: which file, which state of it, on which device, in which dtype.
Folders and device come from the environment: LOOPSCOPE_ZOO, LOOPSCOPE_RESULTS, LOOPSCOPE_RUNS, LOOPSCOPE_DEVICE.

    for name, checkpoint in checkpoints().items():
        load_entry(checkpoint).model
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import streamlit as st

from studies.results import RESULTS, Results, read_results
from studies.tasks import Batch
from studies.zoo import KINDS, ZOO, Entry, load, names, read_card

N_EXAMPLES = 64
"""Held-out examples that the explorer offers."""
EXAMPLE_SEED = 20
"""Seed of those examples; studies use other ones."""


class Checkpoint(NamedTuple):
    """Which weights, as they are on disk now, and how they are held."""

    path: str
    stamp: str    # size and time of the files: a retrained model is another checkpoint
    device: str
    dtype: str


class Listing(NamedTuple):
    """What a menu says about a checkpoint."""

    checkpoint: Checkpoint
    label: str


def zoo_folder() -> Path:
    return Path(os.environ.get("LOOPSCOPE_ZOO", ZOO))


def results_folder() -> Path:
    return Path(os.environ.get("LOOPSCOPE_RESULTS", RESULTS))


def runs_folder() -> Path:
    return Path(os.environ.get("LOOPSCOPE_RUNS", ZOO.parent / "runs"))


def training_tables() -> dict[str, pd.DataFrame]:
    """Training curves by name: of the zoo, and of runs that are not in it (or are being made again)."""
    bundled = sorted(zoo_folder().glob("*/metrics.parquet"))
    tables = {path.parent.name: _curve(str(path), _stamp(path)) for path in bundled}
    return tables | {name: _curve(str(path), _stamp(path)) for name, path in _runs().items()}


def training_ages() -> dict[str, float]:
    """Seconds since each run's file was last written."""
    return {name: time.time() - path.stat().st_mtime for name, path in _runs().items()}


def _runs() -> dict[str, Path]:
    """Metrics of runs by name; one that is in the zoo too is told apart by "(run)"."""
    files = [path for path in sorted(runs_folder().glob("*/metrics.jsonl")) if path.stat().st_size]
    return {f"{path.parent.name} (run)" if (zoo_folder() / path.parent.name).exists() else path.parent.name: path
            for path in files}


@st.cache_data(max_entries=256, show_spinner=False)
def _curve(path: str, stamp: str) -> pd.DataFrame:
    if path.endswith(".parquet"):
        return pd.read_parquet(path)
    whole = Path(path).read_text().rpartition("\n")[0]   # a line that is still being written is left for later
    return pd.DataFrame([json.loads(line) for line in whole.splitlines()])


def checkpoints() -> dict[str, Checkpoint]:
    """The zoo as it is now, LoopMDMs first; reads no weights."""
    found = {}
    for name in names(zoo_folder()):
        path = zoo_folder() / name
        if (path / "model.safetensors").exists():
            found[name] = Checkpoint(str(path), _stamp(path / "model.safetensors", path / "card.json"),
                                     os.environ.get("LOOPSCOPE_DEVICE", "cpu"), "float32")
    kinds = list(KINDS)
    return dict(sorted(found.items(), key=lambda item: (kinds.index(kind_of(item[1])), item[0])))


def kind_of(checkpoint: Checkpoint) -> str:
    """loop, twin or deep."""
    return str(_card(checkpoint)["kind"])


def describe(checkpoint: Checkpoint) -> str:
    """One line about a model: its kind, size and layers."""
    card = _card(checkpoint)
    top = card["topology"]
    loops = f" × S ≤ {top['max_loops']} loops" if top["max_loops"] > 1 else ""
    return (f"{KINDS[card['kind']]}: {card['parameters']:,} parameters, "
            f"{top['head']} head + {top['loop']} mid{loops} + {top['tail']} tail layers")


@st.cache_resource(max_entries=12, show_spinner="Loading the model …")
def load_entry(checkpoint: Checkpoint) -> Entry:
    """Model, task and card, shared by all sessions (the model holds a lock)."""
    return load(checkpoint.path, device=checkpoint.device)


@st.cache_data(max_entries=16, show_spinner=False)
def examples(checkpoint: Checkpoint, n: int = N_EXAMPLES, seed: int = EXAMPLE_SEED) -> Batch:
    """Held-out examples of the checkpoint's task, the same for every model of that task."""
    return load_entry(checkpoint).task.sample(n, seed=seed, split="test")


def studies_run() -> list[str]:
    """Names of the results folders that hold a verdict, those on the headline question first."""
    found = (path.parent.name for path in results_folder().glob("*/verdict.json"))
    return sorted(found, key=lambda name: (not name.startswith("rerun"), name))


def load_results(name: str) -> Results:
    """One study's results. FileNotFoundError names the command that makes them."""
    folder = results_folder() / name
    files = [folder / file for file in ("verdict.json", "measurements.nc")]
    return _results(str(folder), _stamp(*(file for file in files if file.exists())))


@st.cache_resource(max_entries=8, show_spinner="Reading the results …")
def _results(folder: str, stamp: str) -> Results:
    return read_results(folder)


def _card(checkpoint: Checkpoint) -> dict:
    return _read_card(checkpoint.path, checkpoint.stamp)


@st.cache_data(max_entries=256, show_spinner=False)
def _read_card(path: str, stamp: str) -> dict:
    return read_card(path)


def _stamp(*files: Path) -> str:
    return "|".join(f"{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files)
