"""Paths between loops, and single heads: what a loop's update does by itself, and through each later loop.

    path_effects(model, noised, targets=tokens, n_loops=8)              # nll [sender, receiver, example]
    head_scan(model, noised, targets=tokens, n_loops=8)                 # nll [depth, head, example], of a LoopMDM
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel, Unavailable
from probes.answers import ROWS, Judge, asked, changes, of_versions
from probes.batching import derangement
from probes.measurement import check_run, depth_coords

DIRECT = "answer"
"""The receiver that is no loop: what the tail and the readout make of an update themselves."""


@torch.no_grad()
def path_effects(model: LoopedModel, inputs: Inputs, *, targets: Int[Tensor, "batch pos"] | None = None,
                 how: Literal["zero", "mean"] = "zero", n_loops: int | None = None, t: Levels = None,
                 scored: Bool[Tensor, "batch pos"] | None = None, rows: int = ROWS) -> xr.Dataset:
    """What the answer loses when one loop's update is hidden from one later loop; over (sender, receiver, example).

    The residual stream after the loops is what entered them plus one update per loop. The update of loop ``sender``,
    U_i, is left out of what loop ``receiver`` reads, and of nothing else: U_j becomes F_j(X_j − U_i) − (X_j − U_i),
    and every other loop's update stays as it was (path patching, 2304.05969, along the path sender → receiver →
    answer). The last receiver, "answer", is the tail and the readout: X − U_i. ``how`` "mean" leaves the mean of U_i
    over examples in place. ``nll`` [nat], ``kl`` [nat], ``accuracy`` and ``exact`` as in `causal_scan`; NaN where the
    receiver is not later than the sender.

    The effects of a row do not add up to that of `causal_scan`'s skip: paths through several loops are in none of them.
    Raises ValueError as `causal_scan` does, and for fewer than two examples with "mean".
    """
    if how not in ("zero", "mean"):
        raise ValueError(f"how must be zero or mean, not {how!r}.")
    with model.exclusive():
        run = model.run(inputs, n_loops, t=t)
        check_run(run)
        states, logits, context = run
        n, topology = len(states[0]), context.topology
        if how == "mean" and n < 2:
            raise ValueError("mean takes what a loop adds for other examples, and there is one: give more.")
        judge = Judge(logits, *asked(model, inputs, logits, targets, scored))
        loops = topology.loop_depths()
        inside = [(depths[0], depths[-1] + 1) for depths in loops]
        updates = [states[stop] - states[start] for start, stop in inside]
        hidden = [u if how == "zero" else u - u.mean(0, keepdim=True) for u in updates]
        last, tail = states[inside[-1][1]], topology.depth - topology.n_tail
        found = torch.full((len(Judge.MEASURES), len(loops), len(loops) + 1, n), torch.nan)
        for i, gone in enumerate(hidden):
            versions = []
            for start, stop in inside[i + 1:]:
                before = states[start] - gone
                without = model.walk(before, context, start, stop) - before
                versions.append(last + without - (states[stop] - states[start]))
            found[:, i, i + 1:] = of_versions(model, tail, torch.stack([*versions, last - gone]), context, judge, rows)
        clean = judge(logits, torch.arange(n))
    definition = f"U_sender ({'less its mean over examples' if how == 'mean' else 'whole'}) is left out of what the " \
                 "receiver reads, and of nothing else"
    coords = {"sender": np.arange(len(loops)), "receiver": [*map(str, range(len(loops))), DIRECT]}
    return changes(found, clean, ("sender", "receiver", "example"), coords, definition, "arXiv 2304.05969",
                   topology.n_loops)


@torch.no_grad()
def head_scan(model: LoopedModel, inputs: Inputs, *, targets: Int[Tensor, "batch pos"] | None = None,
              how: Literal["zero", "mean", "resample"] = "mean", n_loops: int | None = None, t: Levels = None,
              scored: Bool[Tensor, "batch pos"] | None = None, seed: int = 0, rows: int = ROWS) -> xr.Dataset:
    """What the answer loses when one attention head of one loop is ablated; over (depth, head, example).

    The head's output z [batch, pos, d_head] becomes 0, its mean over examples at that position, or another example's;
    the run goes on from there. Values as in `causal_scan`. Depths share the states before them and the heads of a
    depth go on in one batch.

    Raises Unavailable for a model whose heads have no site of their own (those of `HookedLoopMDM` do), and ValueError
    as `causal_scan` does.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how must be zero, mean or resample, not {how!r}.")
    topology = model.topology(n_loops)
    try:
        sites = [topology.site_at(depth, "attn.hook_z") for depth in range(topology.depth)]
        model.site_space(n_loops).resolve(sites)
    except ValueError as error:
        raise Unavailable(f"{model.name} has no site attn.hook_z, the output of single heads: {error}") from None
    with model.exclusive():
        run = model.run(inputs, n_loops, t=t)
        check_run(run)
        states, logits, context = run
        _, recording = model.run_with_cache(inputs, n_loops, names_filter=sites, t=t)
        n = len(states[0])
        if n < 2 and how != "zero":
            raise ValueError(f"{how} takes what a head says for other examples, and there is one: give more.")
        judge = Judge(logits, *asked(model, inputs, logits, targets, scored))
        other, parts = derangement(n, seed), []
        for depth, site in enumerate(sites):
            z = recording[site]                                                     # [example, pos, head, d_head]
            instead = {"zero": torch.zeros_like(z), "mean": z.mean(0, keepdim=True).expand_as(z),
                       "resample": z[other.to(z.device)]}[how]
            versions = []
            for head in range(z.shape[2]):
                changed = z.clone()
                changed[:, :, head] = instead[:, :, head]
                with model.hooks([(site, lambda x, hook, changed=changed: changed)], n_loops=topology.n_loops):
                    versions.append(model.apply(depth, states[depth], context))
            parts.append(of_versions(model, depth + 1, torch.stack(versions), context, judge, rows))
        clean = judge(logits, torch.arange(n))
    found = torch.stack(parts, 1)                                                   # [measure, depth, head, example]
    coords = {**depth_coords(topology), "head": np.arange(found.shape[2])}
    return changes(found, clean, ("depth", "head", "example"), coords, f"a head's output is replaced ({how})",
                    "arXiv 2202.05262", topology.n_loops)
