"""What a study leaves behind: verdict.json, measurements.nc, report.html, written together.

measurements.nc holds one netCDF group per named dataset, each variable with its definition
and units. A results folder appears whole or not at all.

    folder = write_results("results/rerun-automaton", verdict=…, datasets={"accuracy": …}, html=…)
    results = read_results("results/rerun-automaton")
    results.verdict["verdict"], results.datasets["accuracy"]
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from studies.folders import folder
from studies.zoo import Entry

RESULTS = folder("results")


@dataclass(frozen=True)
class Results:
    """One results folder, read back."""

    path: Path
    verdict: dict[str, Any]
    datasets: dict[str, xr.Dataset]


def write_results(folder: str | Path, *, verdict: Mapping[str, Any], datasets: Mapping[str, xr.Dataset],
                  html: str) -> Path:
    """Write a results folder through a temporary one."""
    final = Path(folder)
    temporary = final.parent / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "verdict.json").write_text(json.dumps(verdict, indent=1, ensure_ascii=False) + "\n")
    (temporary / "report.html").write_text(html)
    for name, dataset in datasets.items():
        file = temporary / "measurements.nc"
        dataset.to_netcdf(file, mode="a" if file.exists() else "w", group=name, engine="h5netcdf")
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    return final


def read_results(folder: str | Path) -> Results:
    """Read a results folder. FileNotFoundError names the command that makes it."""
    import h5netcdf

    path = Path(folder)
    for file in ("verdict.json", "measurements.nc"):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path / file} is missing: make it with `python studies/rerun.py` "
                                    "(or `make study`).")
    with h5netcdf.File(path / "measurements.nc", "r") as file:
        names = list(file.groups)
    datasets = {name: xr.load_dataset(path / "measurements.nc", group=name, engine="h5netcdf") for name in names}
    return Results(path, json.loads((path / "verdict.json").read_text()), datasets)


def provenance(args: Any, entries: Iterable[Entry], *, seconds: float) -> dict[str, Any]:
    """Where a result comes from: the command's settings, the weights by hash, versions, machine, time."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()
                if key not in ("zoo", "results")}
    models = {entry.name: {"sha256": file_hash(entry.path / "model.safetensors"), "command": entry.card["command"]}
              for entry in entries}
    return {"program": "python " + " ".join([f"studies/{Path(sys.argv[0]).name}", *sys.argv[1:]]), "settings": settings,
            "models": models, "seconds": round(seconds, 1), "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "xarray": xr.__version__}}


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
