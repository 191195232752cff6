"""An entry of the catalogue: what a measurement is, and how it is made on a setting.

    entry = ENTRIES["logit_lens"]
    found = entry.measure(setting)                            # a Dataset: value, and low, high, null where there are
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from hooks import Unavailable
from probes import over_examples
from probes.intervals import jackknife
from studies.questions.catalogue.entries.setting import Setting

FAMILIES = ("Lenses", "Linear probes", "Causal effects", "Geometry", "Similarity", "Attention", "Stages")


@dataclass(frozen=True)
class CatalogueEntry:
    """One measurement. ``run`` gives ``value`` over at most two dimensions: what differs, and along what; with ``low``
    and ``high`` (95%) and ``null``, what it would be if there were nothing to find."""

    key: str
    name: str
    family: str
    formula: str
    range: str
    meaning: str
    pitfall: str
    source: str
    run: Callable[[Setting], xr.Dataset]
    null: str = ""                  # what `null` is
    matrix: bool = False            # drawn as a map, not as curves
    loops: int = 1                  # that a run needs for this

    def measure(self, setting: Setting) -> xr.Dataset:
        """``run``, or Unavailable or ValueError with the reason why this model, or these inputs, do not allow it."""
        n_loops = setting.run.context.topology.n_loops
        if n_loops < self.loops:
            raise Unavailable(f"it takes {self.loops} loops, and there is {n_loops}.")
        found = self.run(setting)
        if not bool(found["value"].notnull().any()):
            raise ValueError("it is not defined anywhere on these inputs.")
        return found


def example_mean(values: xr.DataArray, *, null: xr.DataArray | None = None) -> xr.Dataset:
    """The mean over ``example`` with its interval, beside the mean of a null over its examples."""
    found = over_examples(values)
    if null is not None:
        found["null"] = null.mean("example") if "example" in null.dims else null
    return found


def with_interval(value: xr.DataArray, low: xr.DataArray | None = None, high: xr.DataArray | None = None,
                  null: xr.DataArray | None = None) -> xr.Dataset:
    """A value whose interval is there already, or has none."""
    parts = {"value": value, "low": low, "high": high, "null": null}
    return xr.Dataset({name: part.drop_vars([key for key in part.coords if key not in part.indexes and part[key].ndim
                                             == 0]) for name, part in parts.items() if part is not None})


def without_examples(statistic: Callable[[xr.DataArray], xr.DataArray], residual: xr.DataArray,
                     seed: int) -> xr.Dataset:
    """A statistic of the residual streams of all examples together, its interval by leaving examples out."""
    whole = statistic(residual)
    _, low, high = jackknife(lambda chosen: statistic(residual.isel(batch=chosen)).values, residual.sizes["batch"],
                             seed=seed)
    return with_interval(whole, whole.copy(data=low), whole.copy(data=high))


def quantities(parts: dict[str, xr.DataArray]) -> xr.DataArray:
    """Several values along a first dimension, ``quantity``."""
    found: Any = xr.concat(list(parts.values()), "quantity", coords="minimal", compat="override",
                           combine_attrs="override")
    named: xr.DataArray = found.assign_coords(quantity=list(parts))
    return named


def averaged(values: xr.DataArray, over: Sequence[str]) -> xr.DataArray:
    """The mean over some dimensions, NaN left out, attributes kept."""
    return values.mean(list(over), keep_attrs=True)
