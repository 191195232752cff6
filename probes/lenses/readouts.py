"""What a lens's readings say from loop to loop: when a position settles, how its margin is made, whether it is true.

    lens = read_lens(model, noised, n_loops=4, kind="coda", targets=tokens)
    settled(lens).loop_settled.where(lens.scored)                        # [batch, pos], the loop from which on it stays
    margin_by_loop(lens).sum("loop")                                     # the margin after the last loop
    faithfulness(model, noised, n_loops=4, kind="logit").kl              # against the model really stopped there
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from probes.lenses.base import Lens
from probes.lenses.reading import LensKind, read_lens
from probes.measurement import measurement


def after_loops(lens: xr.Dataset) -> xr.Dataset:
    """What the lens reads after each loop, over (loop, batch, pos): its reading at the loop's last layer.

    Takes a reading over depths, or one that is over loops already. Raises ValueError where nothing is looped.
    """
    if "depth" not in lens.dims:
        return lens
    loops = lens.loop.values
    if not (loops >= 0).any():
        raise ValueError("nothing is looped in this run, so nothing can be followed from loop to loop.")
    last = [int(np.flatnonzero(loops == k)[-1]) for k in range(loops.max() + 1)]
    return lens.isel(depth=last).drop_vars(["depth", "layer", "loop"]).rename(depth="loop").assign_coords(
        loop=np.arange(len(last)))


def settled(lens: xr.Dataset) -> xr.Dataset:
    """When the prediction of a position settles, over (batch, pos).

    ``loop_settled``: the first loop from which on the prediction is that after the last loop; ``flips``: how often it
    changes from one loop to the next; ``last_change``: the loop that made the last change, −1 where none did. With
    targets also ``found``: 1 where it is wrong after loop 0 and right after the last loop, and ``lost``: 1 where it is
    right after some loop and wrong after the last one (overthinking, 2604.07822).
    """
    read = after_loops(lens)
    prediction = read.prediction.transpose("loop", ...).values
    n_loops = len(prediction)
    changed = prediction[1:] != prediction[:-1]                                   # [loop − 1, batch, pos]
    numbers = np.arange(1, n_loops).reshape(-1, *[1] * (prediction.ndim - 1))
    last_change = np.where(changed, numbers, 0).max(0, initial=0)
    coords: dict[Hashable, Any] = {"scored": lens.scored}
    told = {"loop_settled": (last_change, "loop from which on the prediction stays",
                             "the first loop whose prediction, and all later ones, are the last loop's"),
            "flips": (changed.sum(0), "changes of the prediction", "number of loops k > 0 whose prediction is not that "
                                                                   "of loop k − 1"),
            "last_change": (np.where(changed.any(0), last_change, -1), "loop of the last change",
                            "the largest k whose prediction is not that of loop k − 1, −1 where there is none")}
    if "target_rank" in read:
        right = _right(read)
        known = ~np.isnan(read.nll.transpose("loop", ...).values[0])
        told["found"] = (np.where(known, ~right[0] & right[-1], np.nan), "made right by later loops",
                         "wrong after loop 0, right after the last loop")
        told["lost"] = (np.where(known, right.any(0) & ~right[-1], np.nan), "right, then wrong",
                        "right after some loop, wrong after the last loop")
    return xr.Dataset({name: measurement(value, ("batch", "pos"), long_name=long_name, units="1", definition=definition,
                                         source="flips: TransformerLens #1469; lost: arXiv 2604.07822", coords=coords)
                       for name, (value, long_name, definition) in told.items()})


def margin_by_loop(lens: xr.Dataset) -> xr.DataArray:
    """What each loop adds to the margin of the target (2609.21383), over (loop, batch, pos) [nat].

    At loop 0 the margin after it; their sum is the margin after the last loop. Raises ValueError without targets.
    """
    read = after_loops(lens)
    if "margin" not in read:
        raise ValueError("a margin is that of a target: read the lens with targets=….")
    margin = read.margin.transpose("loop", "batch", "pos").values
    return measurement(np.concatenate([margin[:1], np.diff(margin, axis=0)]), ("loop", "batch", "pos"),
                       long_name="margin added by a loop", units="nat", source="arXiv 2609.21383",
                       definition="m_k − m_(k−1), m = logit of the target − the largest other logit; m_0 at loop 0",
                       coords={"loop": read.loop, "scored": lens.scored})


@torch.no_grad()
def faithfulness(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, kind: LensKind | Lens = "logit",
                 t: Levels = None) -> xr.Dataset:
    """Does the lens read what the model answers when it is really stopped there? Over (loop, batch, pos).

    ``kl``: KL(model run with k + 1 loops ‖ lens after loop k) [nat]; ``agrees``: 1 where both predict the same token.
    The coda lens agrees by construction wherever a loop does not know how many follow. Costs one forward per number of
    loops. Raises what `read_lens` raises, and ValueError where nothing is looped.
    """
    with model.exclusive():
        loops = range(model.topology(n_loops).n_loops)
        kls, agreements, scored = [], [], model.scored(inputs)
        for k in loops:
            stopped = model(inputs, k + 1, t=t)
            read = after_loops(read_lens(model, inputs, n_loops=n_loops, kind=kind, t=t, final=stopped)).isel(loop=k)
            kls.append(read.kl_to_final.values)
            agreements.append((read.prediction.values == stopped.argmax(-1).cpu().numpy()).astype(np.float32))
    coords: dict[Hashable, Any] = {"loop": np.arange(len(kls)), "scored": (("batch", "pos"), scored.cpu().numpy())}
    told = {"kl": (kls, "divergence from the model stopped there", "nat", "KL(p with k + 1 loops ‖ lens after loop k)"),
            "agrees": (agreements, "same prediction as the model stopped there", "1",
                       "argmax of the lens is that of the model with k + 1 loops")}
    return xr.Dataset({name: measurement(np.stack(value), ("loop", "batch", "pos"), long_name=long_name, units=units,
                                         definition=definition, source="ours, after arXiv 2507.02199", coords=coords)
                       for name, (value, long_name, units, definition) in told.items()})


def by_example(values: xr.DataArray, where: Bool[Tensor, "batch pos"] | xr.DataArray | None = None) -> xr.DataArray:
    """Means over the chosen positions of each example, with the dimension ``example``: what `over_examples` takes.

    ``where`` chooses positions, by default the scored ones. An example without any has NaN.
    """
    chosen = values.scored if where is None else where
    if isinstance(chosen, Tensor):
        chosen = xr.DataArray(chosen.cpu().numpy(), dims=("batch", "pos"))
    with xr.set_options(keep_attrs=True):
        found = values.where(chosen).mean("pos").rename(batch="example")
    return found.drop_vars("scored", errors="ignore")


def _right(read: xr.Dataset) -> np.ndarray:
    return (read.target_rank.transpose("loop", ...).values == 0)
