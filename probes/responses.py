"""Responses: how alike layers answer to the same small push, as Jacobian–vector products. A description, no verdict.

The response of a layer at loop k to a direction v is (J − 1)·v, J its Jacobian at the state that enters it: what a
push along v changes of what the layer adds. Likeness of two responses is the cosine over all positions and widths.

- *cos_loop*: the same layer at another loop; *cos_layer*: another layer at another loop; *cos_input*: the same layer
  and loop on another example;
- **E** = (cos_loop − cos_layer) / (1 − cos_layer): 1 where a layer answers alike at every loop, 0 where no more than
  another layer does;
- **ρ** = (1 − cos_loop) / (1 − cos_input): how much another loop changes the response, in units of what another
  input changes.

Both depend on the unrolled function only, and tell looped models from unlooped ones. They follow the weights, not the
operation: codecs that run A A A A and A B C D with shared weights have nearly the same, and so have untrained loops.
Whether loops repeat an operation is asked by `probes.exchange`. Ours; no other source.

    found = responses(model, noised, own_loops(model.topology(4)))
    float(found.E), float(found.rho), found.cosine            # cosine [place, other_place]
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.cycles import Cycle, Maps
from probes.exchange import Trajectory
from probes.measurement import measurement

SOURCE = "ours: likeness of Jacobian–vector responses"
STEP = 1e-2
"""Length of the push, relative to the rms of the state: central differences with an error of its square."""


@torch.no_grad()
def responses(model: LoopedModel, inputs: Inputs, cycle: Cycle, *, maps: Maps = "layer", t: Levels = None,
              n_directions: int = 4, seed: int = 0, step: float = STEP) -> xr.Dataset:
    """E and ρ of a cycle's maps, with the cosines that they are made of.

    ``cosine`` [place, other_place, example]: likeness of the responses of two places, mean over ``n_directions`` random
    directions, the same for all places and examples; ``cos_input`` [place, example]: with the response on the next
    example. ``cos_loop``, ``cos_layer``, ``E`` and ``rho`` are numbers, means over examples and pairs of places at
    different loops. ``cos_layer`` and ``E`` are NaN where the maps are whole loops or a loop has one layer; a place
    without a response (all its cosines are NaN) is left out.

    Raises ValueError for fewer than two examples, or states that are not finite.
    """
    run = Trajectory.of(model, inputs, cycle, maps=maps, t=t)
    if run.n_examples < 2:
        raise ValueError(f"responses are compared with those on another example, and there is {run.n_examples}.")
    if n_directions < 1 or not step > 0:
        raise ValueError(f"n_directions must be at least 1 and step above 0, not {n_directions} and {step}.")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(run.n_places, run.n_places, run.n_examples, dtype=torch.float64)
    on_other = torch.zeros(run.n_places, run.n_examples, dtype=torch.float64)
    for _ in range(n_directions):
        v = torch.randn(run.states[0].shape[1:], generator=generator).to(run.states[0])
        unit = _units(torch.stack([_response(run, place, v, step) for place in range(run.n_places)]))
        total += torch.einsum("pnx,qnx->pqn", unit, unit).cpu()
        on_other += torch.einsum("pnx,pnx->pn", unit, unit.roll(1, 1)).cpu()
    cosine, cos_input = (part.numpy() / n_directions for part in (total, on_other))
    return _summary(cosine, cos_input, cycle.labels(maps))


# ------------------------------------------------------------------------------ private

def _response(run: Trajectory, place: int, v: Float[Tensor, "pos d_model"], step: float,
              ) -> Float[Tensor, "example pos d_model"]:
    """(J − 1)·v at the states of a place, by central differences."""
    state, every = run.states[place], torch.arange(run.n_examples)
    push = step * state.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6) * v
    there, back = (run.operate(place, state + sign * push, every) for sign in (1, -1))
    return (there - back - 2 * push) / (2 * push.square().mean((1, 2), keepdim=True).sqrt())


def _units(response: Float[Tensor, "place example pos d_model"]) -> Float[Tensor, "place example x"]:
    """Responses of length 1; NaN where there is none beyond rounding."""
    flat = response.flatten(2).double()
    length = flat.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-5 * flat.shape[-1] ** 0.5, flat / length.clamp_min(1e-300), torch.nan)


def _summary(cosine: Float[np.ndarray, "place other_place example"], cos_input: Float[np.ndarray, "place example"],
             labels: list[tuple[int, int]]) -> xr.Dataset:
    loop, layer = (np.array(part) for part in zip(*labels, strict=True))
    apart = loop[:, None] != loop[None]
    alike = layer[:, None] == layer[None]
    cos_loop, cos_layer = _mean(cosine[apart & alike]), _mean(cosine[apart & ~alike])
    of_input = _mean(cos_input)
    places: dict[Hashable, Any] = {"loop": ("place", loop), "layer": ("place", layer)}
    others: dict[Hashable, Any] = {"loop_of_other": ("other_place", loop), "layer_of_other": ("other_place", layer)}

    def number(value: float, long_name: str, definition: str) -> xr.DataArray:
        return measurement(np.array(value), (), long_name=long_name, units="1", definition=definition, source=SOURCE)

    return xr.Dataset({
        "cosine": measurement(cosine, ("place", "other_place", "example"), coords={**places, **others}, units="1",
                              long_name="likeness of responses", source=SOURCE,
                              definition="cosine of (J − 1)·v at two places, mean over directions v"),
        "cos_input": measurement(cos_input, ("place", "example"), coords=places, units="1", source=SOURCE,
                                 long_name="likeness of responses on two examples",
                                 definition="cosine of (J − 1)·v at one place on two examples, mean over directions v"),
        "cos_loop": number(cos_loop, "likeness, same layer at another loop", "mean of cosine over these pairs"),
        "cos_layer": number(cos_layer, "likeness, another layer at another loop", "mean of cosine over these pairs"),
        "E": number(_ratio(cos_loop - cos_layer, 1 - cos_layer), "likeness beyond that of other layers",
                    "(cos_loop − cos_layer) / (1 − cos_layer)"),
        "rho": number(_ratio(1 - cos_loop, 1 - of_input), "change by another loop over change by another input",
                      "(1 − cos_loop) / (1 − mean of cos_input)"),
    }, attrs={"source": SOURCE})


def _mean(values: Float[np.ndarray, "*any"]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _ratio(above: float, below: float) -> float:
    return above / below if abs(below) > 1e-9 else float("nan")
