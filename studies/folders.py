"""Where models and results are, and what a model's folder is called: ``zoo/<task>-<kind>[-<variant>]``.

    folder("zoo")                                       # <checkout>/zoo, or zoo
    entry_name("automaton", "loop", seeded("", 2))      # "automaton-loop-s2"
    without_seed("6x6-s2")                              # "6x6"
"""

from __future__ import annotations

import re
from pathlib import Path


def folder(name: str) -> Path:
    """The folder ``name`` of this checkout, or else of wherever Python is run: installed files are not written to."""
    beside = Path(__file__).resolve().parent.parent
    return beside / name if (beside / "pyproject.toml").is_file() else Path(name)


def entry_name(task: str, kind: str, variant: str = "") -> str:
    """Name of a zoo entry, and of the run that makes it."""
    return _joined(task, kind, variant)


def group_name(task: str, variant: str) -> str:
    """Name of the entries of all kinds and seeds: task and variant without the seed."""
    return _joined(task, without_seed(variant))


def seeded(variant: str, seed: int) -> str:
    """The variant of one seed; seed 0 has no mark."""
    return _joined(variant, f"s{seed}" if seed else "")


def without_seed(variant: str) -> str:
    """The inverse of `seeded`."""
    return re.sub(r"(^|-)s\d+$", "", variant)


def _joined(*parts: str) -> str:
    return "-".join(filter(None, parts))
