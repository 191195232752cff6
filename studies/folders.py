"""Where models and results are: beside the packages in a checkout, in the current folder for an installed package.

    folder("zoo")        # <checkout>/zoo, or zoo
"""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """The folder ``name`` of this checkout, or else of wherever Python is run: installed files are not written to."""
    beside = Path(__file__).resolve().parent.parent
    return beside / name if (beside / "pyproject.toml").is_file() else Path(name)
