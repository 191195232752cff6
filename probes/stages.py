"""The stage test: does a looped model re-run the same operation, and does the content advance?

Two questions that are easily confused (2604.11791 asks the first):

- **operation**: is what a layer *does* in one loop what it does in the next? Read off attention
  patterns (the same layer across loops against different layers) and off a signature of each
  layer, partitioned into variance by layer-in-cycle and by loop.
- **content**: does what can be read out of the state grow from loop to loop?

The control for both is an unlooped network of the same depth, cut into pseudo-loops. Everything
here keeps an ``example`` axis, so that intervals come from resampling examples.

    cycle = own_loops(model.topology(4))
    gram = pattern_gram(model, noised, cycle)
    within, between = repeat_distances(gram)                 # each [example]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from hooks import HookedLoopMDM, LoopMDMConfig
from probes.cycles import Cycle
from probes.measurement import measurement

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


def whole(config: LoopMDMConfig) -> Cycle:
    """All layers of a model run with one loop, as one cycle."""
    return Cycle(config.topology(1), (tuple(range(config.topology(1).depth)),))


# ------------------------------------------------------------------ signatures

@torch.no_grad()
def signature(model: HookedLoopMDM, noised: Int[Tensor, "example pos"], targets: Int[Tensor, "example pos"],
              cycle: Cycle, *, t: float | None = None, chunk: int = 64) -> xr.DataArray:
    """What each layer does, in numbers: example × loop × layer × feature (see `FEATURES`).

    Every number is a mean over one example's masked (or visible) positions; NaN where there are none.
    """
    hooks = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post", "attn.hook_pattern")
    sites = {hook: cycle.sites(hook) for hook in hooks}
    parts = []
    for start in range(0, len(noised), chunk):
        tokens, truth = noised[start:start + chunk], targets[start:start + chunk]
        masked = tokens == model.config.mask_token_id
        wanted = [site for listed in sites.values() for site in listed]
        _, rec = model.run_with_cache(tokens, cycle.topology.n_loops, t=t, names_filter=wanted)
        condition = model.condition(tokens, t)
        rows = [_signature_at(model, [rec[sites[hook][i]] for hook in hooks], truth, masked, condition)
                for i in range(len(sites["hook_resid_pre"]))]
        parts.append(torch.stack(rows, 1))
    values = torch.cat(parts).view(len(noised), cycle.n_loops, cycle.n_layers, len(FEATURES))
    return measurement(values, ("example", "loop", "layer", "feature"), coords={"feature": list(FEATURES)},
                       long_name="signature of a layer", units="1",
                       definition="; ".join(f"{name}: {text}" for name, (_, text) in FEATURES.items()),
                       source="features after arXiv 2604.11791, 2406.19384, 2510.06477")


def _signature_at(model: HookedLoopMDM, activations: list[Tensor], truth: Tensor, masked: Bool[Tensor, "example pos"],
                  condition: Tensor | None) -> Float[Tensor, "example feature"]:
    pre, attn_out, mlp_out, post, pattern = activations
    on = masked.float()

    def mean(values: Tensor, where: Tensor) -> Tensor:
        total = where.sum(1)
        return torch.where(total > 0, (values * where).sum(1) / total.clamp_min(1), torch.nan)

    attention, mlp = attn_out.norm(dim=-1), mlp_out.norm(dim=-1)
    entropy = -(pattern * pattern.clamp_min(1e-12).log()).sum(-1).mean(1)
    to_masked = (pattern * on[:, None, None]).sum(-1).mean(1)
    before, after = (F.log_softmax(model.unembed(x, condition), -1) for x in (pre, post))
    gain = (after - before).gather(-1, truth[..., None])[..., 0]
    spectrum = torch.linalg.svdvals(post)
    spectrum = spectrum / spectrum.sum(-1, keepdim=True)
    return torch.stack([
        mean((post - pre).norm(dim=-1) / pre.norm(dim=-1).clamp_min(1e-12), on),
        mean(attention / (attention + mlp).clamp_min(1e-12), on),
        mean(entropy, on), mean(to_masked, on), mean(to_masked, 1 - on),
        mean(-(after.exp() * after).sum(-1), on), mean(gain, on),
        torch.exp(-(spectrum * spectrum.clamp_min(1e-12).log()).sum(-1)),
    ], 1)


def variance_partition(mean: Float[np.ndarray, "loop layer feature"]) -> dict[str, float]:
    """Shares of a signature's variance by layer-in-cycle, by loop, and interaction; they sum to 1.

    A two-way decomposition without replicates per feature, averaged over the features that vary.
    By chance alone K loops × L layers give the shares (L−1), (K−1) and (K−1)(L−1) over (KL−1).
    """
    grand = mean.mean((0, 1), keepdims=True)
    by_layer = ((mean.mean(0, keepdims=True) - grand) ** 2).sum((0, 1)) * mean.shape[0]
    by_loop = ((mean.mean(1, keepdims=True) - grand) ** 2).sum((0, 1)) * mean.shape[1]
    total = ((mean - grand) ** 2).sum((0, 1))
    varies = np.isfinite(total) & (total > 1e-20)
    layer = float((by_layer[varies] / total[varies]).mean())
    loop = float((by_loop[varies] / total[varies]).mean())
    return {"layer": layer, "loop": loop, "interaction": 1 - layer - loop}


def profile_correlation(a: Float[np.ndarray, "layer feature"], b: Float[np.ndarray, "layer feature"]) -> float:
    """Pearson correlation of two models' layer profiles, each feature standardised over layers first.

    NaN features are left out. 1 means that layer by layer the two do the same.
    """
    keep = np.isfinite(a).all(0) & np.isfinite(b).all(0) & (a.std(0) > 1e-12) & (b.std(0) > 1e-12)
    a, b = ((x[:, keep] - x[:, keep].mean(0)) / x[:, keep].std(0) for x in (a, b))
    return float((a * b).mean())


# ----------------------------------------------------------- attention patterns

@torch.no_grad()
def pattern_gram(model: HookedLoopMDM, noised: Int[Tensor, "example pos"], cycle: Cycle, *, t: float | None = None,
                 chunk: int = 32) -> xr.DataArray:
    """Inner products ⟨A_a, A_b⟩ of all attention patterns of a cycle, per example.

    example × a × b, where a and b run over (loop, layer, head), in that order. Distances, head
    matchings and intervals all follow from it, so that patterns are never held together.
    """
    sites = cycle.sites("attn.hook_pattern")
    parts = []
    for start in range(0, len(noised), chunk):
        _, rec = model.run_with_cache(noised[start:start + chunk], cycle.topology.n_loops, t=t, names_filter=sites)
        flat = torch.stack([rec[site] for site in sites], 1).flatten(3).flatten(1, 2)
        parts.append(flat @ flat.transpose(1, 2))
    index = np.array([(k, i, h) for k in range(cycle.n_loops) for i in range(cycle.n_layers)
                      for h in range(model.config.n_heads)])
    coords: dict[Any, Any] = {f"{name}_{side}": (side, index[:, j]) for side in "ab"
                              for j, name in enumerate(("loop", "layer", "head"))}
    return measurement(torch.cat(parts), ("example", "a", "b"), coords=coords,
                       long_name="inner product of attention patterns",
                       units="1", definition="Σ_{query, key} A_a · A_b", source="after arXiv 2604.11791")


def head_distances(gram: xr.DataArray) -> xr.DataArray:
    """Distance between the patterns of every two (loop, layer) pairs, heads matched: example × p × q.

    d = ‖A − B‖_F / √(‖A‖²_F + ‖B‖²_F), 0 for equal patterns and 1 for disjoint ones, averaged over heads.
    Heads have no common order in different layers, so each pair of layers is given the matching of heads
    (Hungarian, on the mean over examples) under which they are nearest: the comparison favours "same".
    """
    products = gram.values
    squares = np.einsum("eaa->ea", products)
    total = squares[:, :, None] + squares[:, None, :]
    distance = np.sqrt(np.clip(total - 2 * products, 0, None) / np.maximum(total, 1e-12))
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
                       units="1", definition="‖A − B‖_F / √(‖A‖² + ‖B‖²), mean over optimally matched heads",
                       source="after arXiv 2604.11791")


@torch.no_grad()
def frozen_attention(model: HookedLoopMDM, noised: Int[Tensor, "example pos"], cycle: Cycle, *, after: int,
                     matching: xr.DataArray | None = None, t: float | None = None,
                     chunk: int = 64) -> Int[Tensor, "example pos"]:
    """The model's answers when every loop later than ``after`` must reuse that loop's attention patterns.

    The causal form of the operation question: if loops re-run one operation, freezing *where* attention
    looks changes little. ``matching``, a `pattern_gram`, matches heads between layers first (a cycle of
    physically different layers has no common head order); None takes heads by index.
    """
    sites = cycle.sites("attn.hook_pattern")
    n_layers = cycle.n_layers
    answers = []
    for start in range(0, len(noised), chunk):
        tokens = noised[start:start + chunk]
        source = sites[after * n_layers:(after + 1) * n_layers]
        _, rec = model.run_with_cache(tokens, cycle.topology.n_loops, t=t, names_filter=source)
        edits = []
        for k in range(after + 1, cycle.n_loops):
            for i in range(n_layers):
                order = None if matching is None else _matched_heads(matching, k * n_layers + i, after * n_layers + i)
                pattern = rec[source[i]] if order is None else rec[source[i]][:, order]
                edits.append((sites[k * n_layers + i], _replace_with(pattern)))
        answers.append(model.run_with_hooks(tokens, cycle.topology.n_loops, fwd_hooks=edits, t=t).argmax(-1))
    return torch.cat(answers)


def _replace_with(value: Tensor) -> Callable[..., Tensor]:
    return lambda _activation, hook: value


def _matched_heads(gram: xr.DataArray, p: int, q: int) -> Int[np.ndarray, "head"]:
    """For each head of place p, the head of place q that is nearest to it."""
    heads = int(gram.head_a.max()) + 1
    products = gram.values.mean(0)
    squares = np.diag(products)
    rows, columns = slice(p * heads, (p + 1) * heads), slice(q * heads, (q + 1) * heads)
    distance = squares[rows, None] + squares[None, columns] - 2 * products[rows, columns]
    return linear_sum_assignment(distance)[1]


def repeat_distances(distances: xr.DataArray) -> tuple[Float[np.ndarray, "example"], Float[np.ndarray, "example"]]:
    """(same layer in different loops, different layers): mean pattern distance per example."""
    layer, loop = distances.layer.values, distances.loop.values
    same_layer = layer[:, None] == layer[None]
    other_loop = loop[:, None] != loop[None]
    values = distances.values
    return values[:, same_layer & other_loop].mean(1), values[:, ~same_layer].mean(1)
