"""A measurement: values with named axes, units, a definition and its source.

No bare array crosses a module's border: every probe returns xarray objects made here, so
that a figure can label itself and a reader can check what was measured.

    array = measurement(values, ("depth", "pos"), long_name="step size", units="1",
                        definition="‖X_k − X_(k−1)‖ / ‖X_(k−1)‖", source="arXiv 2509.23314", coords={"depth": [1, 2]})
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks import Topology
from hooks.contract import Forward


def measurement(values: Tensor | np.ndarray | Sequence[Any], dims: Sequence[str], *, long_name: str, units: str,
                definition: str, source: str, coords: Mapping[Hashable, Any] | None = None) -> xr.DataArray:
    """A labelled array. ``units`` is "1" for pure numbers, "nat", "bit" or "probability" where they apply."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().float().numpy() if values.is_floating_point() else values.detach().cpu().numpy()
    return xr.DataArray(np.asarray(values), dims=tuple(dims), coords=dict(coords or {}),
                        attrs={"long_name": long_name, "units": units, "definition": definition, "source": source})


def check_finite(values: Tensor | np.ndarray, what: str, *, ruled_out: bool = False) -> None:
    """Raise ValueError unless all ``values`` are finite: a measurement of NaN would be NaN, and say nothing of why.

    ``what`` names them in the message. ``ruled_out`` allows −inf: a logit of an answer that is never given.
    """
    if isinstance(values, Tensor):
        fine = bool((torch.isfinite(values) | (torch.isneginf(values) & ruled_out)).all())
    else:
        fine = bool((np.isfinite(values) | (np.isneginf(values) & ruled_out)).all())
    if not fine:
        raise ValueError(f"{what} holds NaN or infinite values: NaN or infinite weights or inputs, or a loop that "
                         "blows up. Nothing can be measured there.")


def check_run(run: Forward, *, answer: bool = True) -> None:
    """Raise ValueError unless every state of a forward, and its ``answer``, is finite (see `check_finite`)."""
    for state in run.states:
        check_finite(state, "the residual stream")
    if answer:
        check_finite(run.logits, "the model's answer", ruled_out=True)


def mean_over_positions(values: Float[Tensor, "row pos"], where: Bool[Tensor, "row pos"]) -> Float[Tensor, "row"]:
    """Mean over the positions that are chosen in each row; NaN where there are none."""
    number = where.sum(1)
    return torch.where(number > 0, torch.where(where, values, 0.0).sum(1) / number.clamp_min(1), torch.nan)


def mean_by_example(value: Float[Tensor, "point"], example: Int[Tensor, "point"],
                    n: int) -> Float[np.ndarray, "example"]:
    """Means over the points of each example; NaN for an example without any."""
    number = value.new_zeros(n).index_add_(0, example, torch.ones_like(value))
    total = value.new_zeros(n).index_add_(0, example, value)
    return torch.where(number > 0, total / number.clamp_min(1), torch.nan).numpy()


def depth_coords(topology: Topology, depths: Sequence[int] | None = None) -> dict[Hashable, Any]:
    """Coordinates of the depth axis, of all or some depths: ``layer``, and ``loop`` (−1 where a layer runs once)."""
    depths = range(topology.depth) if depths is None else depths
    layers, loops = zip(*[topology.unrolled()[depth] for depth in depths], strict=True)
    return {"depth": np.array(depths), "layer": ("depth", np.array(layers)),
            "loop": ("depth", np.array([-1 if k is None else k for k in loops]))}
