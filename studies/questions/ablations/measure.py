"""What the ablation study measures of one model: quality, whether the state's direction settles, attention.

    numbers, curves = measure(load("zoo/automaton-loop-ablation-base"), examples=64, seed=0)
    numbers["converged"], curves.distance
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from hooks import HookedLoopMDM
from probes.cycles import own_loops
from probes.geometry import classify_tokens, dynamics, fixed_point
from probes.loop_patterns import head_distances, pattern_gram
from probes.measurement import measurement
from studies.questions.claims.measure import answers_over_loops, loop_counts
from studies.zoo import Entry

SETTLED = 128
"""Loops after which the state is taken as the fixed point."""

MEASURES: dict[str, tuple[str, str]] = {
    "exact": ("examples right at S_max", "every free position masked, one forward of S_max loops"),
    "exact_more": ("examples right at 2 · S_max", "the same with twice the loops of training"),
    "cells_once": ("cells right at S = 1", "share of free positions right after one loop"),
    "converged": ("share of states whose direction settles", "cos(X_k, X*) ≥ 0.99 in the last 3 of 32 loops, X* after "
                  "128"),
    "cyclic": ("share of states whose direction cycles", "nearer, with cosine ≥ 0.99, to the state 2 to 4 loops ago "
               "than to the last"),
    "step_cosine": ("cosine of successive steps", "median of cos(Δ_k, Δ_(k−1)) over loops 3 to S_max"),
    "norm_growth": ("growth of the state", "median of ‖X_32‖ / ‖X_8‖"),
    "attention_change": ("change of attention from loop to loop", "distance between a layer's patterns in loops k and "
                         "k − 1, at k = S_max ÷ the mean over all pairs of loops up to S_max"),
}
"""Key, name and definition of each number; states are those after the looped layers, at masked positions."""

UNDEFINED = {
    "step_cosine": "no state moves in two successive loops up to S_max",
    "attention_change": "attention is the same in all loops up to S_max",
}
"""Why a number may have no value; the others always have one."""


@torch.no_grad()
def measure(entry: Entry, *, examples: int, seed: int) -> tuple[dict[str, float], xr.Dataset]:
    """The numbers of `MEASURES`, and curves: accuracy over S, distance to the fixed point and step over loops."""
    model, task = entry.model, entry.task
    s_max = model.config.max_loops
    batch = task.sample(examples, seed=seed, split="test")
    noised = batch.tokens.masked_fill(batch.free, task.mask_token_id)
    counts = loop_counts(s_max)
    scores = {s: task.score(logits.argmax(-1), batch)
              for s, logits, _ in answers_over_loops(model, noised, torch.ones(examples), counts)}
    _, rec = model.run_with_cache(noised, 32, names_filter="blocks.*.hook_resid_post", t=1.0)
    residual, topology = rec.residual_stream(), model.config.topology(32)
    target = fixed_point(model, noised, n_loops=SETTLED, t=1.0)
    norm = _norm(residual)
    moves = dynamics(residual / norm, topology, fixed_point=target / _norm(target))
    masked = (noised == task.mask_token_id).numpy()
    classes = classify_tokens(residual, topology, fixed_point=target).token_class.values[:, masked]
    looped_norm = norm.values[topology.n_head:topology.n_head + 32 * topology.n_mid].reshape(32, -1, *masked.shape)
    numbers = {
        "exact": float(scores[s_max]["exact"].mean()), "exact_more": float(scores[2 * s_max]["exact"].mean()),
        "cells_once": float(scores[1]["cells"].mean()),
        "converged": float((classes >= 2).mean()), "cyclic": float((classes == 1).mean()),
        "step_cosine": _median(moves.step_cosine.values[2:s_max][..., masked]),
        "norm_growth": float(np.median((looped_norm[31] / looped_norm[7])[:, masked])),
        "attention_change": attention_change(model, noised[:16])}
    return numbers, _curves(scores, moves, masked)


def attention_change(model: HookedLoopMDM, noised: torch.Tensor) -> float:
    """How far attention of the same layer still moves in the last loop of training, relative to all pairs of loops."""
    cycle = own_loops(model.topology())
    distance = head_distances(pattern_gram(model, noised, cycle, t=1.0)).mean("example").values
    by_layer = distance.reshape(cycle.n_loops, cycle.n_layers, cycle.n_loops, cycle.n_layers)
    same = np.stack([by_layer[:, layer, :, layer] for layer in range(cycle.n_layers)]).mean(0)   # [loop, loop]
    pairs = same[np.triu_indices(cycle.n_loops, k=1)]
    return float(same[-1, -2] / pairs.mean()) if pairs.any() else float("nan")   # NaN: attention never changes


def _curves(scores: dict[int, dict[str, torch.Tensor]], moves: xr.Dataset, masked: np.ndarray) -> xr.Dataset:
    def over_loops(values: xr.DataArray) -> np.ndarray:
        return np.array([_median(of_one_loop) for of_one_loop in values.values[..., masked]])

    loops: dict[Any, Any] = {"loop": np.arange(1, 33)}
    return xr.Dataset({
        "cells": measurement([float(s["cells"].mean()) for s in scores.values()], ("n_loops",), units="probability",
                             long_name="free cells right", definition="all masked, one forward", source="2605.26106",
                             coords={"n_loops": list(scores)}),
        "distance": measurement(over_loops(moves.distance_to_fixed_point), ("loop",), units="1", coords=loops,
                                long_name="distance to the fixed point", source="2604.11791",
                                definition=f"median of ‖X_k − X*‖ / ‖X*‖, states of norm 1, X* after {SETTLED} loops"),
        "step": measurement(over_loops(moves.step_norm), ("loop",), units="1", coords=loops,
                            long_name="step of the unit state", source="2509.23314",
                            definition="median of ‖X_k − X_(k−1)‖, states of norm 1")})


def _median(values: np.ndarray) -> float:
    """Of the values that are defined; NaN if none is."""
    defined = values[np.isfinite(values)]
    return float(np.median(defined)) if defined.size else float("nan")


def _norm(states: xr.DataArray) -> xr.DataArray:
    return (states ** 2).sum("d_model") ** 0.5
