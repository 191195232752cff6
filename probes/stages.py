"""What is alike from loop to loop: what a layer does, where its attention goes, and what can be read out.

Two questions about a looped model that are easily confused (2604.11791 asks the first):

- **operation**: is what a layer *does* in one loop what it does in the next? Read off attention
  patterns (the same layer across loops against different layers) and off a signature of each
  layer, partitioned into variance by layer-in-cycle and by loop.
- **content**: does what can be read out of the state grow from loop to loop?

The control for both is an unlooped network of the same depth, cut into pseudo-loops. Everything
here keeps an ``example`` axis, so that intervals come from resampling examples.

Pattern distances describe; they decide nothing: shared weights make the same layer alike in all loops whether or
not anything was learned. A statistic that has no value (one looped layer leaves no other layer to compare with;
uniform attention differs nowhere) raises NotDefinedError with the reason.

    cycle = own_loops(model.topology(4))
    distances = head_distances(pattern_gram(model, noised, cycle))
    same, other = same_layer_distance(distances), other_layer_distance(distances)     # each [example]
    distance_ratio(same.mean(), other.mean())
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from hooks import LoopMDMConfig
from hooks.contract import Inputs, Levels, LoopedModel
from hooks.edits import patch
from probes.attention import PATTERN_METRIC, pattern_at, pattern_metric
from probes.batching import in_chunks
from probes.cycles import Cycle
from probes.intervals import NotDefinedError
from probes.measurement import check_finite, measurement

FEATURES = {
    "update": ("relative size of the layer's update", "‖X_post − X_pre‖ / ‖X_pre‖, mean over masked positions"),
    "attention_share": ("attention's share of the update",
                        "‖attn_out‖ / (‖attn_out‖ + ‖mlp_out‖), mean over masked positions"),
    "attention_entropy": ("attention entropy", "−Σ_j A_ij ln A_ij, mean over heads and masked queries, in nats"),
    "flow_masked_masked": ("attention from masked to masked", "Σ_{j masked} A_ij, mean over heads and masked queries"),
    "flow_visible_masked": ("attention from visible to masked", "Σ_{j masked} A_ij, mean over heads, visible queries"),
    "lens_entropy": ("logit-lens entropy", "entropy of unembed(ln_final(X_post)), mean over masked positions, in nats"),
    "lens_gain": ("fall of the logit-lens NLL", "NLL(X_pre) − NLL(X_post) of the true token, masked positions, nats"),
    "effective_rank": ("effective rank", "exp of the entropy of σ/Σσ of X_post [pos, d_model] (Roy & Vetterli 2007)"),
}
"""What a layer's signature is made of: long name and definition of each number."""

PATTERN_ROUNDING = 1e-3
"""Distances of attention patterns below this are float32 rounding (d² is good to about 1e-6), and count as 0."""

FEATURE_ROUNDING = 1e-5
"""A feature of the signature whose standard deviation is below this does not vary: float32 rounding."""


def whole(config: LoopMDMConfig) -> Cycle:
    """All layers of a model run with one loop, as one cycle."""
    return Cycle(config.topology(1), (tuple(range(config.topology(1).depth)),))


# ------------------------------------------------------------------ signatures

@torch.no_grad()
def signature(model: LoopedModel, inputs: Inputs, targets: Int[Tensor, "example pos"], cycle: Cycle, *,
              t: Levels = None, chunk: int = 64) -> xr.DataArray:
    """What each layer does, in numbers: example × loop × layer × feature (see `FEATURES`).

    Every number is a mean over one example's scored positions, the masked ones of a masked model, or over the others;
    NaN where there are none. ``targets`` hold the answers at scored positions, −1 where there is none.
    Raises `hooks.Unavailable` where the model does not give one of the places or patterns, and ValueError where
    they are not finite.
    """
    n_loops, depths = cycle.topology.n_loops, [depth for loop in cycle.depths for depth in loop]
    places = [[*(model.site(depth, kind, n_loops=n_loops) for kind in ("resid_pre", "attn_out", "mlp_out",
                                                                      "resid_post")),
               model.attention(depth, n_loops=n_loops)] for depth in depths]
    parts = []
    for some, some_t, index in in_chunks(model, inputs, t, size=chunk):
        truth = targets[index.to(targets.device)]
        scored = model.scored(some) & (truth >= 0)
        wanted = [site for sites in places for site in sites]
        _, rec = model.run_with_cache(some, n_loops, t=some_t, names_filter=wanted)
        _, context = model.enter(some, n_loops, t=some_t)
        rows = [_signature_at(partial(model.read, context=context), [*(rec[site] for site in sites[:-1]),
                                                                      pattern_at(rec, sites[-1])], truth, scored)
                for sites in places]
        parts.append(torch.stack(rows, 1))
    values = torch.cat(parts).view(-1, cycle.n_loops, cycle.n_layers, len(FEATURES))
    return measurement(values, ("example", "loop", "layer", "feature"), coords={"feature": list(FEATURES)},
                       long_name="signature of a layer", units="1",
                       definition="; ".join(f"{name}: {text}" for name, (_, text) in FEATURES.items()),
                       source="features after arXiv 2604.11791, 2406.19384, 2510.06477")


def _signature_at(read: Callable[[Tensor], Tensor], activations: list[Tensor], truth: Tensor,
                  scored: Bool[Tensor, "example pos"]) -> Float[Tensor, "example feature"]:
    for activation in activations[:4]:
        check_finite(activation, "an activation of the layer")
    answers = [_wide(read(activations[i])) for i in (0, 3)]
    for answer in answers:
        check_finite(answer, "the answer that a state is read as", ruled_out=True)
    before, after = (F.log_softmax(answer, -1) for answer in answers)
    pre, attn_out, mlp_out, post, pattern = map(_wide, activations)
    on = scored.float()

    def mean(values: Tensor, where: Tensor) -> Tensor:
        total = where.sum(1)
        return torch.where(total > 0, (values * where).sum(1) / total.clamp_min(1), torch.nan)

    attention, mlp = attn_out.norm(dim=-1), mlp_out.norm(dim=-1)
    entropy = -(pattern * pattern.clamp_min(1e-12).log()).sum(-1).mean(1)
    to_masked = (pattern * on[:, None, None]).sum(-1).mean(1)
    gain = (after - before).gather(-1, truth.clamp_min(0)[..., None])[..., 0]
    spectrum = torch.linalg.svdvals(post)
    spectrum = spectrum / spectrum.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.stack([
        mean((post - pre).norm(dim=-1) / pre.norm(dim=-1).clamp_min(1e-12), on),
        mean(attention / (attention + mlp).clamp_min(1e-12), on),
        mean(entropy, on), mean(to_masked, on), mean(to_masked, 1 - on),
        mean(-(after.exp() * after).sum(-1), on), mean(gain, on),
        torch.exp(-(spectrum * spectrum.clamp_min(1e-12).log()).sum(-1)),
    ], 1)


def _wide(x: Tensor) -> Tensor:
    """At least float32: what is computed from an activation shall not be rounded as the activation was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def example_mean(values: Float[np.ndarray, "example ..."]) -> Float[np.ndarray, "..."]:
    """Mean over the examples in which a value is defined; NaN where it is in none."""
    defined = np.isfinite(values)
    count = defined.sum(0)
    return np.where(count > 0, np.where(defined, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def variance_partition(mean: Float[np.ndarray, "loop layer feature"]) -> dict[str, float]:
    """Shares of a signature's variance by layer-in-cycle, by loop, and interaction; they sum to 1.

    A two-way decomposition without replicates per feature, averaged over the features that vary.
    By chance alone K loops × L layers give the shares (L−1), (K−1) and (K−1)(L−1) over (KL−1).
    Raises NotDefinedError for one loop or one layer, and if no feature varies by more than rounding.
    """
    for size, name in zip(mean.shape[:2], ("loop", "layer"), strict=True):
        if size < 2:
            raise NotDefinedError(f"there is one {name} only, which leaves no variance by {name}")
    grand = mean.mean((0, 1), keepdims=True)
    by_layer = ((mean.mean(0, keepdims=True) - grand) ** 2).sum((0, 1)) * mean.shape[0]
    by_loop = ((mean.mean(1, keepdims=True) - grand) ** 2).sum((0, 1)) * mean.shape[1]
    total = ((mean - grand) ** 2).sum((0, 1))
    varies = np.isfinite(total) & (total > mean.shape[0] * mean.shape[1] * FEATURE_ROUNDING ** 2)
    if not varies.any():
        raise NotDefinedError("no feature of the signature varies over loops and layers")
    layer = float((by_layer[varies] / total[varies]).mean())
    loop = float((by_loop[varies] / total[varies]).mean())
    return {"layer": layer, "loop": loop, "interaction": 1 - layer - loop}


def profile_correlation(a: Float[np.ndarray, "layer feature"], b: Float[np.ndarray, "layer feature"]) -> float:
    """Pearson correlation of two models' layer profiles, each feature standardised over layers first.

    NaN features are left out. 1 means that layer by layer the two do the same.
    Raises NotDefinedError if no feature varies over the layers of both models by more than rounding.
    """
    keep = (np.isfinite(a).all(0) & np.isfinite(b).all(0)
            & (a.std(0) > FEATURE_ROUNDING) & (b.std(0) > FEATURE_ROUNDING))
    if not keep.any():
        raise NotDefinedError("no feature of the signature varies over the layers of both models")
    a, b = ((x[:, keep] - x[:, keep].mean(0)) / x[:, keep].std(0) for x in (a, b))
    return float((a * b).mean())


# ----------------------------------------------------------- attention patterns

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


def same_layer_distance(distances: xr.DataArray) -> Float[np.ndarray, "example"]:
    """Mean distance of a layer's patterns in two different loops. NotDefinedError if there is one loop only."""
    same = distances.layer.values[:, None] == distances.layer.values[None]
    other_loop = distances.loop.values[:, None] != distances.loop.values[None]
    if not other_loop.any():
        raise NotDefinedError("there is one loop only, and no other loop to compare it with")
    return distances.values[:, same & other_loop].mean(1)


def other_layer_distance(distances: xr.DataArray) -> Float[np.ndarray, "example"]:
    """Mean distance of two different layers' patterns, loops alike or not. NotDefinedError if there is one layer."""
    other = distances.layer.values[:, None] != distances.layer.values[None]
    if not other.any():
        raise NotDefinedError("one layer is looped, and there is no other layer to compare it with")
    return distances.values[:, other].mean(1)


def distance_ratio(same: float | np.floating[Any], other: float | np.floating[Any]) -> float:
    """Distance of the same layer over loops ÷ that of different layers. NotDefinedError if the latter is 0."""
    if other == 0:
        raise NotDefinedError("the attention patterns of different layers do not differ, and nothing can be divided "
                              "by their distance")
    return float(same / other)
