"""More rows than in training, in words: pure functions of what was measured.

    text = judge(curves, trained=8)
"""

from __future__ import annotations

import xarray as xr

from studies.zoo import SHORT_NAMES


def best_loops(data: xr.Dataset) -> xr.Dataset:
    """Each kind at the number of loops that serves it best on each number of rows, by cells right on average."""
    quality = data.cells.mean(["row", "seed"])
    return data.isel(n_loops=quality.fillna(-1).argmax("n_loops"))


def judge(data: xr.Dataset, trained: int) -> str:
    """What each kind gets right at the fewest rows and at the most."""
    cells, least, most = best_loops(data).cells.mean(["seed", "row"]), int(data.n_rows.min()), int(data.n_rows.max())
    parts = [f"{SHORT_NAMES[str(kind)]} {cells.sel(kind=kind, n_rows=least):.0%} of cells at {least} rows and "
             f"{cells.sel(kind=kind, n_rows=most):.0%} at {most}" for kind in data.kind.values]
    return f"Trained on {trained} rows; guessing gets half of the cells. {'; '.join(parts)}."
