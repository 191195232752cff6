"""What a study leaves behind: verdict.json, measurements.nc, report.html, written together.

measurements.nc holds one netCDF group per named dataset, each variable with its definition
and units. A results folder appears whole or not at all.

    folder = write_results("results/stage_test", study="stage_test", verdict={"answer": "…"},
                           datasets={"automaton-loop": measured}, html="<p>…</p>")
    results = read_results("results/stage_test")
    results.verdict["answer"], results.datasets["automaton-loop"]
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from hooks.writing import written_whole
from studies.folders import folder
from studies.zoo import Entry, Problem, read_json

RESULTS = folder("results")
FILES = ("verdict.json", "measurements.nc")
"""What a results folder must hold."""


SCRIPTS = {"stage_test": "studies/stage_test.py", "claims": "studies/claims.py", "ablations": "studies/ablations.py",
           "length_generalization": "studies/length_generalization.py", "loops_and_steps": "studies/loops_and_steps.py",
           "noise_level": "studies/noise_level.py"}
"""The program of each study, by the name that its verdicts carry."""


@dataclass(frozen=True)
class Results:
    """One results folder, read back."""

    path: Path
    verdict: dict[str, Any]
    datasets: dict[str, xr.Dataset]

    @property
    def study(self) -> str:
        """What was asked, one of `SCRIPTS`; "" of results of another version, which do not say."""
        return str(self.verdict.get("study", ""))


def made_by(folder: str | Path) -> str:
    """The command that makes a results folder. Its verdict says which; where that cannot be read, its name does."""
    path = Path(folder)
    try:
        study = str(read_json(path / "verdict.json").get("study", ""))
    except ValueError:
        study = ""
    return f"python {SCRIPTS.get(study) or SCRIPTS.get(path.name.partition('-')[0], SCRIPTS['stage_test'])}"


def write_results(folder: str | Path, *, study: str, verdict: Mapping[str, Any], datasets: Mapping[str, xr.Dataset],
                  html: str) -> Path:
    """Write a results folder, whole or not at all; ``study`` (of `SCRIPTS`) becomes the verdict's first entry.

    Raises ValueError, before anything is written, for an unknown study, and if the verdict holds NaN or an infinity:
    JSON has neither, and a number that is not defined is stored as the reason why.
    """
    final, told = Path(folder), {"study": study, **verdict}
    if study not in SCRIPTS:
        raise ValueError(f"no study is called {study!r}; there are {', '.join(SCRIPTS)}.")
    if found := _not_finite(told):
        raise ValueError(f"the verdict of {final.name} holds a number that is not finite at {', '.join(found)}: store "
                         "None, or the reason why it is not defined.")
    with written_whole(final) as temporary:
        temporary.mkdir()
        (temporary / "verdict.json").write_text(json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        (temporary / "report.html").write_text(html)
        for name, dataset in datasets.items():
            file = temporary / "measurements.nc"
            dataset.to_netcdf(file, mode="a" if file.exists() else "w", group=name, engine="h5netcdf")
    return final


def _not_finite(value: Any, where: str = "") -> list[str]:
    """Where NaN and infinities stand, as table[0].loop.value."""
    if isinstance(value, Mapping):
        return [at for key, v in value.items() for at in _not_finite(v, f"{where}.{key}".lstrip("."))]
    if isinstance(value, (list, tuple)):
        return [at for i, v in enumerate(value) for at in _not_finite(v, f"{where}[{i}]")]
    return [where] if isinstance(value, float) and not math.isfinite(value) else []


def read_results(folder: str | Path) -> Results:
    """Read a results folder. FileNotFoundError and ValueError name the file, and the command that makes it."""
    path = Path(folder)
    verdict, names = _opened(path)
    try:
        datasets = {name: xr.load_dataset(path / "measurements.nc", group=name, engine="h5netcdf") for name in names}
    except Exception as error:
        raise _unreadable(path, error) from error
    return Results(path, verdict, datasets)


def list_results(folder: str | Path = RESULTS) -> tuple[list[str], list[Problem]]:
    """Names of the results folders that can be read, and what is wrong with the others. Reads no values.

    They come by study, in the order of `SCRIPTS`, those of none at the end.
    """
    paths = sorted({file.parent for name in FILES for file in Path(folder).glob(f"*/{name}")})
    order = list(SCRIPTS)
    names: dict[str, int] = {}
    problems: list[Problem] = []
    for path in paths:
        try:
            study = _opened(path)[0].get("study")
            names[path.name] = order.index(study) if study in order else len(order)
        except (FileNotFoundError, ValueError) as error:
            file = next(path / name for name in FILES if str(error).startswith(str(path / name)))
            problems.append(Problem(file, str(error).removeprefix(str(file)).removeprefix(":").strip()))
    return sorted(names, key=lambda name: (names[name], name)), problems


def _opened(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(the verdict, names of the datasets) of a results folder."""
    import h5netcdf

    for file in FILES:
        if not (path / file).exists():
            raise FileNotFoundError(f"{path / file} is missing: make it again with `{made_by(path)}`.")
    try:
        verdict = read_json(path / "verdict.json")
    except ValueError as error:
        raise ValueError(f"{path / 'verdict.json'}: {error}; make it again with `{made_by(path)}`.") from error
    try:
        with h5netcdf.File(path / "measurements.nc", "r") as file:
            return verdict, list(file.groups)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    """h5py, h5netcdf and xarray raise errors of many kinds on a damaged file; they become one."""
    return ValueError(f"{path / 'measurements.nc'}: it cannot be read ({error}); "
                      f"make it again with `{made_by(path)}`.")


def provenance(args: Any, entries: Iterable[Entry], *, seconds: float) -> dict[str, Any]:
    """Where a result comes from: the command's settings, the weights by hash, versions, machine, time."""
    settings = {key: _within_the_project(value) if isinstance(value, Path) else value
                for key, value in asdict(args).items() if key not in ("zoo", "results")}
    models = {entry.name: {"sha256": file_hash(entry.path / "model.safetensors"), "command": entry.card["command"]}
              for entry in entries}
    return {"program": "python " + " ".join([f"studies/{Path(sys.argv[0]).name}", *_anywhere(sys.argv[1:])]),
            "settings": settings,
            "models": models, "seconds": round(seconds, 1), "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "xarray": xr.__version__}}


def _anywhere(arguments: Sequence[str]) -> list[str]:
    """A command line as anyone would give it: without the folders of models and results."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--zoo", "--results"):
            next(rest, None)
        elif not argument.startswith(("--zoo=", "--results=")):
            kept.append(argument)
    return kept


def _within_the_project(path: Path) -> str:
    """A path of the project as it is from there: where somebody's copy lies is no part of a result."""
    root = Path(__file__).resolve().parents[1]
    return str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else str(path)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
