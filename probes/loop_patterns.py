"""Attention patterns of a cycle, loop by loop and layer by layer: how far they lie apart, and answers with old ones.

They describe and decide nothing: shared weights make the same layer's patterns alike in all loops, whether or not
anything was learned.

    cycle = own_loops(model.topology(4))
    distances = head_distances(pattern_gram(model, noised, cycle))                    # [example, p, q]
    answers = frozen_attention(model, noised, cycle, after=1)                         # [example, pos]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from hooks.edits import patch
from probes.attention import PATTERN_METRIC, pattern_at, pattern_metric
from probes.batching import in_chunks
from probes.cycles import Cycle
from probes.measurement import check_finite, measurement

PATTERN_ROUNDING = 1e-3
"""Distances of attention patterns below this are float32 rounding (d² is good to about 1e-6), and count as 0."""


@torch.no_grad()
def pattern_gram(model: LoopedModel, inputs: Inputs, cycle: Cycle, *, t: Levels = None,
                 chunk: int = 32) -> xr.DataArray:
    """Inner products ⟨A_a, A_b⟩ of all attention patterns of a cycle, per example.

    example × a × b, where a and b run over (loop, layer, head), in that order. Distances, head
    matchings and intervals all follow from it, so that patterns are never held together.
    Raises `hooks.Unavailable` where the model makes no patterns.
    """
    sites = _pattern_sites(model, cycle)
    parts = []
    for some, some_t, _ in in_chunks(model, inputs, t, size=chunk):
        _, rec = model.run_with_cache(some, cycle.topology.n_loops, t=some_t, names_filter=sites)
        held = torch.stack([_wide(pattern_at(rec, site)) for site in sites], 1)     # [example, place, head, query, key]
        n_heads = held.shape[2]
        flat = held.flatten(3).flatten(1, 2)
        parts.append(flat @ flat.transpose(1, 2))
    index = np.array([(k, i, h) for k in range(cycle.n_loops) for i in range(cycle.n_layers)
                      for h in range(n_heads)])
    coords: dict[Any, Any] = {f"{name}_{side}": (side, index[:, j]) for side in "ab"
                              for j, name in enumerate(("loop", "layer", "head"))}
    return measurement(torch.cat(parts), ("example", "a", "b"), coords=coords,
                       long_name="inner product of attention patterns",
                       units="1", definition="Σ_{query, key} A_a · A_b", source="after arXiv 2604.11791")


def head_distances(gram: xr.DataArray) -> xr.DataArray:
    """Distance between the patterns of every two (loop, layer) pairs, heads matched: example × p × q.

    The distance of two patterns is `probes.attention.pattern_metric`, averaged over heads.
    Heads have no common order in different layers, so each pair of layers is given the matching of heads
    (Hungarian, on the mean over examples) under which they are nearest: the comparison favours "same".
    Distances below `PATTERN_ROUNDING` are 0.
    """
    products = gram.values
    squares = np.einsum("eaa->ea", products)
    a, b = squares[:, :, None], squares[:, None, :]
    distance = pattern_metric(np.sqrt(np.clip(a + b - 2 * products, 0, None)), a, b)
    distance = np.where(distance < PATTERN_ROUNDING, 0, distance)
    heads = int(gram.head_a.max()) + 1
    n = products.shape[1] // heads
    blocks = distance.reshape(len(distance), n, heads, n, heads)
    matched = np.zeros((len(distance), n, n), dtype=np.float32)
    for p in range(n):
        for q in range(p + 1, n):
            rows, columns = linear_sum_assignment(blocks[:, p, :, q, :].mean(0))
            matched[:, p, q] = matched[:, q, p] = blocks[:, p, rows, q, columns].mean(1)
    loops, layers = gram.loop_a.values[::heads], gram.layer_a.values[::heads]
    coords: dict[Any, Any] = {"loop": ("p", loops), "layer": ("p", layers),
                              "loop_q": ("q", loops), "layer_q": ("q", layers)}
    return measurement(matched, ("example", "p", "q"), coords=coords, long_name="distance of attention patterns",
                       units="1", definition=f"{PATTERN_METRIC}, mean over optimally matched heads",
                       source="after arXiv 2604.11791")


@torch.no_grad()
def frozen_attention(model: LoopedModel, inputs: Inputs, cycle: Cycle, *, after: int,
                     matching: xr.DataArray | None = None, t: Levels = None,
                     chunk: int = 64) -> Int[Tensor, "example pos"]:
    """The model's answers when every loop later than ``after`` must reuse that loop's attention patterns.

    The causal form of the operation question: if loops re-run one operation, freezing *where* attention
    looks changes little. ``matching``, a `pattern_gram`, matches heads between layers first (a cycle of
    physically different layers has no common head order); None takes heads by index.
    """
    sites, n_layers, n_loops = _pattern_sites(model, cycle), cycle.n_layers, cycle.topology.n_loops
    source = range(after * n_layers, (after + 1) * n_layers)
    answers = []
    for some, some_t, _ in in_chunks(model, inputs, t, size=chunk):
        _, rec = model.run_with_cache(some, n_loops, t=some_t, names_filter=[sites[place] for place in source])
        edits = []
        for place in range(source.stop, len(sites)):
            taken = source[place % n_layers]
            pattern = rec[sites[taken]]
            edits.append(patch(sites[place], pattern if matching is None
                               else pattern[:, _matched_heads(matching, place, taken)]))
        answer = model.run_with_hooks(some, n_loops, fwd_hooks=edits, t=some_t)
        check_finite(answer, "the model's answer", ruled_out=True)
        answers.append(answer.argmax(-1))
    return torch.cat(answers)


def _pattern_sites(model: LoopedModel, cycle: Cycle) -> list[str]:
    """Where the attention patterns of a cycle are, loop by loop, layer by layer."""
    return [model.attention(depth, n_loops=cycle.topology.n_loops) for loop in cycle.depths for depth in loop]


def _matched_heads(gram: xr.DataArray, p: int, q: int) -> Int[np.ndarray, "head"]:
    """For each head of place p, the head of place q that is nearest to it."""
    heads = int(gram.head_a.max()) + 1
    products = gram.values.mean(0)
    squares = np.diag(products)
    rows, columns = slice(p * heads, (p + 1) * heads), slice(q * heads, (q + 1) * heads)
    distance = squares[rows, None] + squares[None, columns] - 2 * products[rows, columns]
    return linear_sum_assignment(distance)[1]


def _wide(x: Tensor) -> Tensor:
    """At least float32: what is computed from an activation shall not be rounded as the activation was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
