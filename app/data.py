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

from studies.results import FILES as RESULT_FILES
from studies.results import RESULTS, Results, list_results, read_results
from studies.tasks import Batch
from studies.zoo import KINDS, REMEDY, ZOO, Entry, Listing, Problem, listing, load, read_card, read_metrics

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


def zoo_folder() -> Path:
    return Path(os.environ.get("LOOPSCOPE_ZOO", ZOO))


def results_folder() -> Path:
    return Path(os.environ.get("LOOPSCOPE_RESULTS", RESULTS))


def runs_folder() -> Path:
    return Path(os.environ.get("LOOPSCOPE_RUNS", ZOO.parent / "runs"))


def training_tables() -> tuple[dict[str, pd.DataFrame], list[Problem]]:
    """Training curves by name, and what could not be read.

    Curves of the zoo, and of runs that are not in it (or are being made again).
    """
    files = {path.parent.name: path for path in sorted(zoo_folder().glob("*/metrics.parquet"))} | _runs()
    read = {name: _curve(str(path), _stamp(path)) for name, path in files.items()}
    tables = {name: table for name, (table, _) in read.items() if not table.empty}
    return tables, [problem for _, problems in read.values() for problem in problems]


def training_ages() -> dict[str, float]:
    """Seconds since each run's file was last written."""
    return {name: time.time() - path.stat().st_mtime for name, path in _runs().items()}


def _runs() -> dict[str, Path]:
    """Metrics of runs by name; one that is in the zoo too is told apart by "(run)"."""
    files = [path for path in sorted(runs_folder().glob("*/metrics.jsonl")) if path.stat().st_size]
    return {f"{path.parent.name} (run)" if (zoo_folder() / path.parent.name).exists() else path.parent.name: path
            for path in files}


@st.cache_data(max_entries=256, show_spinner=False)
def _curve(path: str, stamp: str) -> tuple[pd.DataFrame, list[Problem]]:
    if path.endswith(".jsonl"):
        return _run_so_far(Path(path))
    try:
        return read_metrics(Path(path).parent), []
    except (FileNotFoundError, ValueError) as error:
        return pd.DataFrame(), [Problem(Path(path), str(error).removeprefix(f"{path}: "))]


def _run_so_far(file: Path) -> tuple[pd.DataFrame, list[Problem]]:
    """The evaluations of a run that may be going; lines that hold none are left out, and the first of them is named."""
    whole = file.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]   # the rest is still being written
    rows, broken = [], {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(_evaluation(line))
        except ValueError as error:
            broken[number] = str(error)
    problems = []
    if broken:
        number = min(broken)
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        problems.append(Problem(file, f"line {number} is left out{more}: {broken[number]}."))
    return pd.DataFrame(rows), problems


def _evaluation(line: str) -> dict[str, float]:
    """One line of metrics.jsonl. ValueError if it is not an evaluation."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(row, dict) or not {"flops", "nelbo"} <= set(row) or not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in row.values()):
        raise ValueError("it is not an object of numbers with flops and nelbo")
    return dict(row)


def _listing() -> Listing:
    """The zoo as it is now."""
    return _listing_of(str(zoo_folder()), _stamp(*sorted(zoo_folder().glob("*/card.json"))))


@st.cache_data(max_entries=8, show_spinner=False)
def _listing_of(folder: str, stamp: str) -> Listing:
    return listing(folder)


def zoo_problems() -> list[Problem]:
    """What is wrong with the entries that `checkpoints` leaves out."""
    found = _listing()
    weights = [zoo_folder() / name / "model.safetensors" for name in found.cards]
    return [*found.problems, *(Problem(file, f"it is missing; {REMEDY}") for file in weights if not file.exists())]


def checkpoints() -> dict[str, Checkpoint]:
    """The whole entries of the zoo as it is now, LoopMDMs first; reads no weights."""
    found, cards = {}, _listing().cards
    for name in cards:
        path = zoo_folder() / name
        if (path / "model.safetensors").exists():
            found[name] = Checkpoint(str(path), _stamp(path / "model.safetensors", path / "card.json"),
                                     os.environ.get("LOOPSCOPE_DEVICE", "cpu"), "float32")
    kinds = list(KINDS)
    return dict(sorted(found.items(), key=lambda item: (kinds.index(cards[item[0]]["kind"]), item[0])))


def model_in_words(checkpoint: Checkpoint) -> str:
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


def studies_run() -> tuple[list[str], list[Problem]]:
    """Names of the results folders that can be shown, those on the headline question first; problems of the others."""
    files = sorted(file for name in RESULT_FILES for file in results_folder().glob(f"*/{name}"))
    return _results_of(str(results_folder()), _stamp(*files))


@st.cache_data(max_entries=8, show_spinner=False)
def _results_of(folder: str, stamp: str) -> tuple[list[str], list[Problem]]:
    return list_results(folder)


def load_results(name: str) -> Results:
    """One study's results. FileNotFoundError and ValueError name the file, and the command that makes it."""
    folder = results_folder() / name
    files = [folder / file for file in RESULT_FILES]
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
    return "|".join(f"{file.parent.name}-{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files)
