"""Attention: who looks at whom, per head, layer and loop, and how much that changes over loops.

Second stop of the way hooks → probes → studies → app. Patterns of a deep unrolled network are
large, so summaries are taken inside the hook and distances a few examples at a time; `patterns`
holds whole patterns, for a picture.

    summary = attention_summary(model, noised, n_loops=8)
    summary.flow.sel(query_role="masked", key_role="masked")             # (depth, head)
    distance = pattern_distance(model, noised, n_loops=8)
    distance.jensen_shannon                                              # (depth, depth_b) [nat]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import SiteError, Topology
from hooks.contract import Inputs, Levels, LoopedModel, Unavailable
from hooks.recording import Recording
from probes.batching import select_examples
from probes.measurement import check_finite, depth_coords, measurement

ROLES = {True: ("masked", "visible"), False: ("scored", "unscored")}
"""The two roles of positions, of a model with a mask token and of one without."""

SINK_THRESHOLD = 0.3
"""A key is a sink of a head if it draws at least this share of the head's attention (2510.06477)."""

PATTERN_METRIC = "‖A − B‖_F / √(‖A‖_F² + ‖B‖_F²)"

CHUNK_ELEMENTS = 2 ** 25
"""Pattern entries that `pattern_distance` holds at a time (128 MB in float32)."""

_SUMMARY: dict[str, tuple[tuple[str, ...], str, str, str, str]] = {
    "flow": (("query_role", "key_role"), "attention flow between roles", "probability",
             "mean over queries i in role Q of Σ_{j in role K} A_ij", "ours, after arXiv 2605.26106"),
    "flow_over_chance": (("query_role", "key_role"), "attention flow over chance", "1",
                         "flow / (|K|/T), so that 1 is attention that ignores roles", "ours, after arXiv 2605.26106"),
    "entropy": ((), "attention entropy (mixing score)", "nat", "mean over queries i of −Σ_j A_ij log A_ij",
                "arXiv 2604.11791"),
    "entropy_by_role": (("query_role",), "attention entropy by the query's role", "nat",
                        "mean over queries i in role Q of −Σ_j A_ij log A_ij", "arXiv 2604.11791"),
    "column_concentration": ((), "column-sum concentration", "1",
                             "C = 1 + (1/log T) Σ_j c_j log c_j with c_j = (1/T) Σ_i A_ij; 0 is even, 1 is one key",
                             "arXiv 2604.11791"),
    "sink_rate": ((), "sink rate", "1", f"share of keys j with (1/T) Σ_i A_ij ≥ {SINK_THRESHOLD}; any j, since "
                  "attention is bidirectional", "arXiv 2510.06477"),
}


@torch.no_grad()
def patterns(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, layers: Sequence[int] | None = None,
             loops: Sequence[int] | None = None, batch: Sequence[int] | None = None, t: Levels = None) -> xr.DataArray:
    """Whole attention patterns, (depth, batch, head, query, key); rows sum to 1.

    ``layers`` and ``batch`` (example indices) choose, by default all. ``loops`` chooses among the loops of looped
    layers (−1 is the last one); layers that run once are unaffected by it. Raises SiteError for a layer or loop
    that does not run, and Unavailable where the model makes no patterns.
    """
    inputs, t = select_examples(model, inputs, t, batch)
    topology = model.topology(n_loops)
    depths = _chosen(topology, layers, loops)
    sites = [model.attention(depth, n_loops=n_loops) for depth in depths]
    _, rec = model.run_with_cache(inputs, n_loops, names_filter=sites, t=t)
    value = torch.stack([pattern_at(rec, site) for site in sites])
    coords = depth_coords(topology, depths)
    coords["batch"] = np.arange(value.shape[1]) if batch is None else np.asarray(batch)
    return measurement(value, ("depth", "batch", "head", "query", "key"), long_name="attention pattern",
                       units="probability", definition="A = softmax(q kᵀ / √d_head) over keys", coords=coords,
                       source="arXiv 1706.03762")


@torch.no_grad()
def attention_summary(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None,
                      per_example: bool = False) -> xr.Dataset:
    """What each head does at each depth: flows between masked and visible positions, entropy, concentration, sinks.

    Of a model without a mask token the roles are ``scored`` and ``unscored``, as the model's own rule has them.

    ``flow``, ``flow_over_chance`` (depth, head, query_role, key_role), ``entropy`` (depth, head), ``entropy_by_role``
    (depth, head, query_role), ``column_concentration`` and ``sink_rate`` (depth, head). Values are means over
    examples, leaving out those in which a value is undefined (no query or no key of that role); with
    ``per_example`` a ``batch`` axis follows depth instead. Reduced inside the hook: no pattern is kept.
    Sources: 2604.11791, 2510.06477, flows ours after 2605.26106.
    """
    scored = model.scored(inputs)
    real = model.real_positions(inputs)
    other = ~scored if real is None else ~scored & real.to(scored.device)
    roles, names = torch.stack([scored, other], dim=-1), list(ROLES[model.mask_token_id is not None])
    topology = model.topology(n_loops)
    sites = [model.attention(depth, n_loops=n_loops) for depth in range(topology.depth)]
    _, rec = model.run_with_cache(inputs, n_loops, names_filter=sites, t=t,
                                  reduce=lambda pattern, site: _summary(checked_pattern(pattern, site), roles))
    packed = torch.stack([rec[site] for site in sites])
    coords = {**depth_coords(topology), "query_role": names, "key_role": names}
    variables, start = {}, 0
    for name, (axes, long_name, units, definition, source) in _SUMMARY.items():
        width = 2 ** len(axes)
        value = packed[..., start:start + width].unflatten(-1, (2,) * len(axes)) if axes else packed[..., start]
        start += width
        dims: tuple[str, ...] = ("depth", "batch", "head", *axes)
        if not per_example:
            value, dims = value.nanmean(1), ("depth", "head", *axes)
            definition += "; mean over examples"
        used = {c: v for c, v in coords.items() if not str(c).endswith("role") or c in dims}
        variables[name] = measurement(value, dims, long_name=long_name, units=units, definition=definition,
                                      source=source, coords=used)
    return xr.Dataset(variables, attrs={"n_loops": topology.n_loops})


@torch.no_grad()
def pattern_distance(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None) -> xr.Dataset:
    """How far the attention patterns of each two depths lie apart, heads matched by their index.

    ``frobenius``: `pattern_metric` per head and example, then averaged; between 0 and 1. ``jensen_shannon`` [nat]:
    H((A_i + B_i)/2) − (H(A_i) + H(B_i))/2, averaged over queries i, heads and examples; between 0 and log 2. Both
    (depth, depth_b), symmetric, 0 on the diagonal; ``frobenius_by_example`` and ``jensen_shannon_by_example`` (batch,
    depth, depth_b) hold what they are means of, for a bootstrap. Source: 2604.11791 (the normalisation of the first is
    ours).
    """
    topology = model.topology(n_loops)
    sites = [model.attention(depth, n_loops=n_loops) for depth in range(topology.depth)]
    frobenius: list[Tensor] = []
    jensen_shannon: list[Tensor] = []
    real = model.real_positions(inputs)
    size, at_once = model.batch_size(inputs), 1  # the first example tells how large a pattern is
    while len(frobenius) < size:
        chunk = range(len(frobenius), min(size, len(frobenius) + at_once))
        some, some_t = select_examples(model, inputs, t, chunk)
        _, rec = model.run_with_cache(some, n_loops, names_filter=sites, t=some_t)
        held = [pattern_at(rec, site) for site in sites]
        at_once = max(1, CHUNK_ELEMENTS // (len(held) * held[0][0].numel()))
        for example in range(len(chunk)):  # one at a time stays in the processor's cache: twice as fast as a batch
            one = torch.stack([pattern[example] for pattern in held]).float()
            if real is not None:  # padded queries attend too, but mean nothing
                kept = real[chunk[example]].to(one.device)
                one = one[:, :, kept][..., kept]
            frobenius.append(_frobenius(one))
            jensen_shannon.append(_jensen_shannon(one))
    coords = depth_coords(topology)
    coords |= {f"{name}_b": ("depth_b", coord[1] if isinstance(coord, tuple) else coord)
               for name, coord in coords.items()}
    described = {
        "frobenius": ("distance of attention patterns (Frobenius)", "1", torch.stack(frobenius),
                      f"{PATTERN_METRIC}, heads matched by index, mean over heads",
                      "arXiv 2604.11791; normalisation ours"),
        "jensen_shannon": ("distance of attention patterns (Jensen–Shannon)", "nat", torch.stack(jensen_shannon),
                           "H((A_i + B_i)/2) − (H(A_i) + H(B_i))/2, heads matched by index, mean over queries i and "
                           "heads", "arXiv 2604.11791"),
    }
    variables = {}
    for name, (long_name, units, value, definition, source) in described.items():
        variables[name] = measurement(value.mean(0), ("depth", "depth_b"), long_name=long_name, units=units,
                                      definition=definition + "; mean over examples", source=source, coords=coords)
        variables[f"{name}_by_example"] = measurement(value, ("batch", "depth", "depth_b"), long_name=long_name,
                                                      units=units, definition=definition, source=source, coords=coords)
    return xr.Dataset(variables, attrs={"n_loops": topology.n_loops})


def pattern_at(rec: Recording, site: str) -> Float[Tensor, "batch head query key"]:
    """The attention pattern in a recording. Raises `hooks.Unavailable` if something else is recorded there, and
    ValueError if it is not finite."""
    return checked_pattern(rec[site], site)


Array = TypeVar("Array", Tensor, np.ndarray)


def checked_pattern(pattern: Tensor, site: str) -> Float[Tensor, "batch head query key"]:
    """The pattern itself. Raises Unavailable if it is none, ValueError if it is not finite."""
    if pattern.ndim != 4:
        raise Unavailable(f"{site} holds {list(pattern.shape)} and no attention pattern [batch, head, query, key]: "
                          "name its site when you adopt the model, attention='attn.hook_out.1'.")
    check_finite(pattern, f"the attention pattern at {site}")
    return pattern


def pattern_metric(apart: Array, square: Array, other_square: Array) -> Array:
    """‖A − B‖_F / √(‖A‖_F² + ‖B‖_F²), of ‖A − B‖_F, ‖A‖_F² and ‖B‖_F²: the distance of two attention patterns.

    0 for equal patterns, 1 for two without a common entry. Arrays broadcast. The normalisation is ours.
    """
    return apart / (square + other_square) ** 0.5


# ---------------------------------------------------------------------- private

def _summary(pattern: Float[Tensor, "batch head query key"],
             roles: Bool[Tensor, "batch pos role"]) -> Float[Tensor, "batch head value"]:
    """The values of `_SUMMARY` in its order, packed along the last axis; padding has no role, and counts nowhere."""
    pattern = pattern.float()
    real = roles.any(-1).to(pattern)
    n_pos = real.sum(1, keepdim=True)                                          # [batch, 1]
    member = roles.to(pattern)
    size = member.sum(1)                                                       # [batch, role]
    mass = pattern @ member[:, None]                                           # [batch, head, query, key_role]
    flow = torch.einsum("bhqk,bqr->bhrk", mass, member) / size[:, None, :, None]  # 0/0 = nan: no such query
    over_chance = flow / (size / n_pos)[:, None, None, :]
    entropy = _entropy(pattern)                                                # [batch, head, query]
    entropy_by_role = entropy @ member / size[:, None]
    column = torch.einsum("bhqk,bq->bhk", pattern, real) / n_pos[..., None]    # padded keys have none
    concentration = 1 - _entropy(column) / n_pos.log()
    sinks = (column >= SINK_THRESHOLD).float().sum(-1) / n_pos
    mixing = (entropy * real[:, None]).sum(-1) / n_pos
    return torch.cat([flow.flatten(2), over_chance.flatten(2), mixing[..., None], entropy_by_role,
                      concentration[..., None], sinks[..., None]], dim=-1)


def _entropy(p: Float[Tensor, "*batch key"]) -> Float[Tensor, "*batch"]:
    return torch.special.entr(p).sum(-1)


def _frobenius(one: Float[Tensor, "depth head query key"]) -> Float[Tensor, "depth depth_b"]:
    flat = one.transpose(0, 1).flatten(2)                                       # [head, depth, query·key]
    # Differences, not the Gram matrix: near a fixed point the cancellation in ‖A‖² + ‖B‖² − 2A·B is all there is.
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    square = flat.square().sum(-1)
    return pattern_metric(apart, square[:, :, None], square[:, None, :]).mean(0)


def _jensen_shannon(one: Float[Tensor, "depth head query key"]) -> Float[Tensor, "depth depth_b"]:
    n_depth = len(one)
    entropy = _entropy(one).mean((1, 2))                                        # [depth]
    apart = one.new_zeros(n_depth, n_depth)
    for i in range(n_depth - 1):  # one depth against all later ones: n_depth steps, and no more memory than `one`
        mixed = _entropy((one[i] + one[i + 1:]) / 2).mean((1, 2))
        apart[i, i + 1:] = mixed - (entropy[i] + entropy[i + 1:]) / 2
    return (apart + apart.mT).clamp(0, math.log(2))  # rounding alone leaves this range


def _chosen(topology: Topology, layers: Sequence[int] | None, loops: Sequence[int] | None) -> list[int]:
    """The depths of ``layers``, in ``loops`` where they are looped. SiteError for one that does not run."""
    every = topology.unrolled()
    there = {layer for layer, _ in every}
    for layer in layers or ():
        if layer not in there:
            raise SiteError(f"layer {layer} does not run: this model has the layers 0..{max(there)}.")
    for loop in loops or ():
        if not -topology.n_loops <= loop < topology.n_loops:
            raise SiteError(f"loop {loop} does not run: this run has the loops 0..{topology.n_loops - 1}.")
    wanted = None if loops is None else {loop % topology.n_loops for loop in loops}
    return [depth for depth, (layer, loop) in enumerate(every)
            if (layers is None or layer in layers) and (wanted is None or loop is None or loop in wanted)]
