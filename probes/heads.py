"""What kind of head a head is, per loop: where it looks, whether that lasts, and what chance would give.

    found = head_kinds(model, noised, n_loops=8)                # previous, next, self, same_token, distance, stability
    over_examples(found.previous_over_chance)                   # [depth, head], with intervals
    attention_over_steps(model, [step.before for step in trace], n_loops=8)     # sinks by (step, depth, head)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel, tensors_of
from probes.attention import attention_summary, checked_pattern
from probes.measurement import depth_coords, measurement

_KINDS: Mapping[str, tuple[str, str]] = {
    "self": ("attention to the position itself", "A_ii"),
    "previous": ("attention to the previous position", "A_i,i−1"),
    "next": ("attention to the next position", "A_i,i+1"),
    "same_token": ("attention to other positions with the same visible token",
                   "Σ_j A_ij over j ≠ i with x_j = x_i, not masked"),
    "distance": ("mean distance looked over", "Σ_j A_ij |i − j|"),
}


@torch.no_grad()
def head_kinds(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None,
               where: Bool[Tensor, "batch pos"] | None = None) -> xr.Dataset:
    """Where each head of each loop looks, over (depth, head, example), means over the queries ``where`` (default all).

    ``self``, ``previous``, ``next`` and ``same_token`` are shares of attention, each a mean over the queries that have
    such a key, ``distance`` is in positions. Each has a companion ``…_over_chance``, divided by its value under
    attention that is the same for all keys that are no padding: 1 is chance, in every length of sequence. ``stability``
    is 1 − ½ Σ_j |A_ij − A'_ij|, A' the same head's pattern one loop earlier: 1 where nothing moved, which heads of
    untrained models come near, too; NaN in loop 0 and outside the loops. NaN where an example has no such query.
    Reduced inside the hook: two loops are kept at most.

    ``same_token`` needs tokens among the inputs and is left out without. Definitions of head kinds: 2209.11895 and
    1905.09418. Raises Unavailable where the model makes no patterns, ValueError for a mask of another shape.
    """
    topology = model.topology(n_loops)
    sites = [model.attention(depth, n_loops=n_loops) for depth in range(topology.depth)]
    layers = {site: layer for site, (layer, _) in zip(sites, topology.unrolled(), strict=True)}
    looped = {site for depths in topology.loop_depths() for site in (sites[depth] for depth in depths)}
    before: dict[int, Tensor] = {}
    keys = _Keys(model, inputs, where)

    def reduce(pattern: Tensor, site: str) -> Tensor:
        now = checked_pattern(pattern, site).float()
        last = before.get(layers[site]) if site in looped else None
        before[layers[site]] = now
        steady = torch.full_like(now[..., 0], torch.nan) if last is None else 1 - (now - last).abs().sum(-1) / 2
        return torch.cat([keys.summed(now), keys.mean(steady, keys.queries)[..., None]], -1)

    _, recording = model.run_with_cache(inputs, n_loops, names_filter=sites, t=t, reduce=reduce)
    packed = torch.stack([recording[site] for site in sites]).transpose(1, 2)         # [depth, head, example, value]
    coords = {**depth_coords(topology), "head": np.arange(packed.shape[1])}
    variables = {}
    for i, (name, chance) in enumerate(keys.chance.items()):
        long_name, formula = _KINDS[name]
        ratio = packed[..., i] / chance.to(packed)
        for key, value, label, unit, rule in (
                (name, packed[..., i], long_name, "position" if name == "distance" else "probability", formula),
                (f"{name}_over_chance", ratio, f"{long_name}, relative to chance", "1",
                 f"({formula}) ÷ its value under attention that is the same for all keys")):
            variables[key] = measurement(value, ("depth", "head", "example"), long_name=label, units=unit,
                                         definition=f"{rule}; mean over queries that have such a key", coords=coords,
                                         source="arXiv 2209.11895; arXiv 1905.09418")
    variables["stability"] = measurement(packed[..., -1], ("depth", "head", "example"), coords=coords, units="1",
                                         long_name="overlap with the pattern one loop earlier",
                                         definition="1 − ½ Σ_j |A_ij − A'_ij|, mean over queries",
                                         source="arXiv 2604.11791")
    return xr.Dataset(variables, attrs={"n_loops": topology.n_loops})


def attention_over_steps(model: LoopedModel, steps: Sequence[Inputs], *, n_loops: int | None = None,
                         t: Sequence[Levels] | None = None) -> xr.Dataset:
    """Entropy, sinks and column concentration at each denoising step, over (step, depth, example, head).

    The values are `attention_summary`'s.
    ``steps`` are what the model is given at each step of a generation, such as ``before`` of the sampler's trace;
    ``t`` the noise level of each, for models that are told. Source: 2510.15731. Raises ValueError for no step, or as
    many levels as there are not steps.
    """
    levels = [None] * len(steps) if t is None else list(t)
    if not steps or len(levels) != len(steps):
        raise ValueError(f"give at least one step, and a noise level for each or none; not {len(steps)} and "
                         f"{len(levels)}.")
    found = [attention_summary(model, step, n_loops=n_loops, t=level, per_example=True)
             [["entropy", "sink_rate", "column_concentration"]] for step, level in zip(steps, levels, strict=True)]
    joined = xr.concat(found, xr.IndexVariable("step", np.arange(len(found))), combine_attrs="override")
    return joined.rename(batch="example")


# -------------------------------------------------------------------------------------- private

class _Keys:
    """Which keys of a query are meant, and what attention to all keys alike would give them."""

    def __init__(self, model: LoopedModel, inputs: Inputs, where: Tensor | None):
        scored = model.scored(inputs)
        real = model.real_positions(inputs)
        real = torch.ones_like(scored) if real is None else real.to(scored.device)
        if where is not None and where.shape != scored.shape:
            raise ValueError(f"where has shape {tuple(where.shape)}, the inputs are [batch, pos] = "
                             f"{tuple(scored.shape)}.")
        self.queries = real if where is None else real & where.to(scored.device)
        n_pos = scored.shape[1]
        place = torch.arange(n_pos, device=scored.device)
        pairs = real[:, None, :] & self.queries[..., None]                           # [batch, query, key]
        apart = place[None, :] - place[:, None]                                      # key − query
        meant = {"self": (apart == 0) & pairs, "previous": (apart == -1) & pairs, "next": (apart == 1) & pairs}
        tokens = next((part for part in tensors_of(inputs) if part.shape == scored.shape and
                       part.dtype in (torch.int64, torch.int32)), None)
        if tokens is not None:
            shown = real if model.mask_token_id is None else real & (tokens != model.mask_token_id)
            same = (tokens[:, :, None] == tokens[:, None, :]) & shown[:, None, :] & shown[..., None]
            meant["same_token"] = same & (apart != 0) & pairs
        self.weights = {name: chosen.float() for name, chosen in meant.items()}
        self.asking = {name: chosen.any(-1) for name, chosen in meant.items()}
        self.weights["distance"], self.asking["distance"] = apart.abs().float() * pairs, self.queries
        uniform = real[:, None, :].float() / real.sum(1).clamp_min(1)[:, None, None].float()
        self.chance = {name: self.mean((uniform * weight).sum(-1)[:, None], self.asking[name])[:, 0].cpu()
                       for name, weight in self.weights.items()}

    def summed(self, pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head kind"]:
        return torch.stack([self.mean(torch.einsum("bhqk,bqk->bhq", pattern, weight.to(pattern)), self.asking[name])
                            for name, weight in self.weights.items()], -1)

    @staticmethod
    def mean(values: Float[Tensor, "batch head query"], asking: Bool[Tensor, "batch query"],
             ) -> Float[Tensor, "batch head"]:
        """Mean over the queries that ask; NaN where none does."""
        asking = asking.to(values.device)
        return values.masked_fill(~asking[:, None], 0.0).sum(-1) / asking.sum(-1)[:, None]
