"""Make every measurement that a model allows, keep each as it comes, and say why the others are missing.

    found = measure(subjects, Asked(examples=8), kept=Path("runs/catalogue"), entries=("logit_lens", "exchange"))
    found["automaton-loop"].measured["logit_lens"].value      # [depth]
    found["automaton-twin"].missing["exchange"]               # "it takes 2 loops, …"
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import xarray as xr
from tqdm import tqdm

from hooks import Unavailable
from hooks.writing import written_whole
from studies.questions.catalogue.entries import ENTRIES
from studies.questions.catalogue.entries.setting import Setting
from studies.questions.catalogue.subjects import Measurable

VERSION = 3
"""Changes when what is measured changes, so that nothing older is taken for it."""


@dataclass(frozen=True)
class Asked:
    """How every model is measured."""

    examples: int = 16
    t: float = 0.9             # noise level of models that denoise
    n_loops: int = 4           # of models whose loops can be chosen
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """What one model gave: measurements, and for the others the reason; seconds of each."""

    about: str
    measured: dict[str, xr.Dataset] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def measure(subjects: Sequence[Measurable], asked: Asked, *, kept: Path, entries: Sequence[str] = tuple(ENTRIES),
            workers: int = 1, progress: bool = True) -> dict[str, Found]:
    """Every entry on every model, by model; kept one by one, so that a run that was stopped goes on from there."""
    folders = {subject.name: kept / f"{subject.name}-{_hash(subject, asked)}" for subject in subjects}
    todo = [subject for subject in subjects
            if any(not _is_kept(folders[subject.name], key) for key in entries)]
    bar = tqdm(total=len(subjects), initial=len(subjects) - len(todo), desc="catalogue", unit="model",
               disable=not progress)
    if workers > 1 and len(todo) > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            running = [pool.submit(_one, subject, asked, folders[subject.name], tuple(entries), 1) for subject in todo]
            for future in as_completed(running):
                future.result()
                bar.update()
    else:
        for subject in todo:
            _one(subject, asked, folders[subject.name], tuple(entries), None)
            bar.update()
    bar.close()
    return {subject.name: _read(folders[subject.name], subject.about, entries) for subject in subjects}


def _one(subject: Measurable, asked: Asked, folder: Path, entries: tuple[str, ...], threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    setting: Setting | None = None
    for key in entries:
        if not _is_kept(folder, key):
            setting = setting or subject.setting(asked.examples, asked.t, asked.n_loops, asked.seed)
            _make(key, setting, folder)


def _make(key: str, setting: Setting, folder: Path) -> None:
    """Write the measurement, or why there is none."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found: xr.Dataset | None = ENTRIES[key].measure(setting)
            reason = ""
        except (Unavailable, ValueError, KeyError) as error:   # what a model or these inputs do not allow
            found, reason = None, " ".join(str(error).split())
    told = {"seconds": round(time.monotonic() - began, 2), "missing": reason}
    if found is not None:
        with written_whole(folder / f"{key}.nc") as temporary:
            storable(found).to_netcdf(temporary, engine="h5netcdf")
    with written_whole(folder / f"{key}.json") as temporary:
        temporary.write_text(json.dumps(told))


def storable(found: xr.Dataset) -> xr.Dataset:
    """What a file can hold of a measurement: its values, its axes with layers and loops, and what they mean."""
    kept = found.drop_vars([name for name in found.coords if name not in found.indexes
                            and str(name).removesuffix("_b") not in ("layer", "loop")])
    for value in kept.data_vars.values():
        value.attrs = {name: text for name, text in value.attrs.items()
                       if name in ("long_name", "units", "definition", "source")}
    kept.attrs = {}
    return kept


# -------------------------------------------------------------------------------- keeping

def _hash(subject: Measurable, asked: Asked) -> str:
    what = json.dumps([VERSION, subject.name, subject.identity, asdict(asked)])
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def _is_kept(folder: Path, key: str) -> bool:
    return (folder / f"{key}.json").is_file()


def _read(folder: Path, about: str, entries: Sequence[str]) -> Found:
    found = Found(about)
    for key in entries:
        told = json.loads((folder / f"{key}.json").read_text())
        found.seconds[key] = told["seconds"]
        if told["missing"]:
            found.missing[key] = told["missing"]
        else:
            found.measured[key] = xr.load_dataset(folder / f"{key}.nc", engine="h5netcdf")
    return found
