"""Every probe on float16 and bfloat16 models: what it says of the float32 model, up to the model's own rounding."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.edits import freeze
from probes import attention, dimension, geometry, heads, loop_patterns, paths, perturbed, similarity
from probes.attention import attention_summary, pattern_distance, patterns
from probes.cycles import own_loops
from probes.dimension import intrinsic_dimension
from probes.geometry import (
    classify_tokens,
    contraction,
    dynamics,
    effective_rank,
    fixed_point,
    matrix_entropy,
    trajectory_pca,
)
from probes.heads import attention_over_steps, head_kinds
from probes.lenses import read_lens, reading
from probes.linear import (
    online_code,
    probe_latent,
    probe_loop,
    probe_values,
    transfer,
)
from probes.loop_patterns import frozen_attention, head_distances, pattern_gram
from probes.paths import head_scan, path_effects
from probes.periods import periods
from probes.perturbed import basins, line_search
from probes.similarity import between_depths, cka_between_depths, linear_cka
from tests.small import MASK, VARIANTS, small_model, small_tokens

LOOPS = 8
TOKENS = small_tokens(batch=24, seed=3)
TRUTH = small_tokens(batch=24, seed=4).clamp(max=MASK - 1)

periods_of = importlib.import_module("probes.periods")    # `probes.periods` is the function
LINEAR = tuple(importlib.import_module(f"probes.linear.{name}")
               for name in ("latents", "transfer", "loop_index", "description_length"))

Result = xr.Dataset | xr.DataArray


def residual(model: HookedLoopMDM) -> tuple[xr.DataArray, Any]:
    with torch.no_grad():
        _, rec = model.run_with_cache(TOKENS, LOOPS, names_filter="blocks.*.hook_resid_post")
    return rec.residual_stream(), rec.topology


def states(model: HookedLoopMDM) -> Tensor:
    with torch.no_grad():
        _, rec = model.run_with_cache(TOKENS, LOOPS, names_filter="blocks.2.hook_resid_post")
    return rec.stack("blocks.2.hook_resid_post").flatten(1, 2)          # [loop, example, d_model], in the model's dtype


def numbers(*values: Any) -> xr.Dataset:
    return xr.Dataset({f"value_{i}": (tuple(f"axis_{i}_{j}" for j in range(np.ndim(v))), np.asarray(v))
                       for i, v in enumerate(values)})


PROBES: dict[str, Callable[[HookedLoopMDM], Result]] = {
    "logit lens": lambda m: read_lens(m, TOKENS, n_loops=LOOPS, kind="logit", targets=TRUTH, top_k=3),
    "coda lens": lambda m: read_lens(m, TOKENS, n_loops=LOOPS, kind="coda", targets=TRUTH),
    "straight line": lambda m: reading.read_line(m, TOKENS, n_loops=LOOPS, kind="logit", targets=TRUTH, top_k=3),
    "probe_latent": lambda m: probe_latent(m, TOKENS, TOKENS % 2, 2, n_loops=LOOPS, groups=torch.arange(9) % 2),
    "probe_values": lambda m: probe_values(m, TOKENS, TOKENS.double(), n_loops=LOOPS),
    "transfer": lambda m: transfer(m, TOKENS, TOKENS % 2, n_loops=LOOPS),
    "probe_loop": lambda m: probe_loop(m, TOKENS, where=TOKENS >= 0, n_loops=LOOPS),
    "online_code": lambda m: online_code(m, TOKENS, TOKENS % 2, 2, n_loops=LOOPS),
    "dynamics": lambda m: dynamics(*residual(m), fixed_point=fixed_point(m, TOKENS, n_loops=24)),
    "fixed_point": lambda m: fixed_point(m, TOKENS, n_loops=24),
    "contraction": lambda m: contraction(dynamics(*residual(m), fixed_point=fixed_point(m, TOKENS, n_loops=24))
                                         .distance_to_fixed_point, floor=0.2),
    "classify_tokens": lambda m: classify_tokens(*residual(m), threshold=0.9),
    "trajectory_pca": lambda m: trajectory_pca(residual(m)[0])[["explained_variance", "explained_variance_ratio"]],
    "effective_rank": lambda m: effective_rank(residual(m)[0]),
    "matrix_entropy": lambda m: matrix_entropy(residual(m)[0]),
    "patterns": lambda m: patterns(m, TOKENS, n_loops=LOOPS),
    "attention_summary": lambda m: attention_summary(m, TOKENS, n_loops=LOOPS),
    "pattern_distance": lambda m: pattern_distance(m, TOKENS, n_loops=LOOPS),
    "linear_cka": lambda m: linear_cka(states(m)[0], states(m)[-1]),
    "cka_between_depths": lambda m: cka_between_depths(residual(m)[0]),
    "between_depths": lambda m: between_depths(residual(m)[0], kind="cosine"),
    "intrinsic_dimension": lambda m: intrinsic_dimension(residual(m)[0]),
    "periods": lambda m: periods(*residual(m)),
    "head_kinds": lambda m: head_kinds(m, TOKENS, n_loops=LOOPS),
    "attention_over_steps": lambda m: attention_over_steps(m, [TOKENS, TRUTH], n_loops=LOOPS),
    "head_scan": lambda m: head_scan(m, TOKENS, targets=TRUTH, n_loops=LOOPS)[["nll", "kl"]],
    "path_effects": lambda m: path_effects(m, TOKENS, targets=TRUTH, n_loops=LOOPS)[["nll", "kl"]],
    "line_search": lambda m: line_search(m, TOKENS, targets=TRUTH, n_loops=LOOPS)[["nll"]],
    "basins": lambda m: basins(m, TOKENS, n_loops=LOOPS, n_starts=1)[["distance"]],
    "pattern_gram": lambda m: pattern_gram(m, TOKENS, own_loops(m.topology(LOOPS))),
    "head_distances": lambda m: head_distances(pattern_gram(m, TOKENS, own_loops(m.topology(LOOPS)))),
    "frozen_attention": lambda m: numbers(frozen_attention(m, TOKENS, own_loops(m.topology(LOOPS)), after=1)),
}

SHARES = {"probe_latent", "probe_values", "transfer", "probe_loop", "online_code"}
"""Probes that count right answers: a share of a few dozen examples moves by whole examples."""


@pytest.fixture(scope="module", params=["plain", "everything"])
def settling(request: pytest.FixtureRequest) -> HookedLoopMDM:
    """A model that rounding does not send elsewhere: its blocks write a quarter of what random ones write."""
    model = small_model(**VARIANTS[request.param])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.out.weight *= 0.25
            block.mlp.down.weight *= 0.25
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(PROBES))
def test_probes_agree_with_the_model_in_single_precision(name: str, dtype: torch.dtype,
                                                         settling: HookedLoopMDM) -> None:
    rounding = float(torch.finfo(dtype).eps)
    full = _variables(PROBES[name](settling))
    rounded = small_model(**_choices(settling)).eval()
    rounded.load_state_dict(settling.state_dict())
    half = _variables(PROBES[name](rounded.to(dtype)))
    assert half.keys() == full.keys()
    for key, value in half.items():
        expected = full[key]
        assert (np.isfinite(value) == np.isfinite(expected)).all(), key
        if value.dtype.kind in "iub" or key == "target_rank":  # values that jump: how many agree?
            assert (value == expected).mean() > 0.9, key
            continue
        assert value.dtype.kind == "f"
        assert value.dtype.itemsize >= 4, key  # a measurement is never held in half precision
        apart = np.abs(value - expected)[np.isfinite(expected)]
        size = np.abs(expected)[np.isfinite(expected)]
        allowed = 0.1 if name in SHARES else 12 * rounding * max(float(np.sqrt((size ** 2).mean())), 1.0)
        assert np.sqrt((apart ** 2).mean()) <= allowed, (key, apart.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_of_equal_patterns_are_zero_in_every_precision(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    with model.hooks([freeze(0)], n_loops=4):
        distance = head_distances(pattern_gram(model, TOKENS, own_loops(model.topology(4))))
    same_layer = distance.layer.values[:, None] == distance.layer.values[None]
    assert distance.values[:, same_layer].max() < 1e-3
    assert distance.values[:, ~same_layer].min() > 0.01


def test_every_public_probe_is_here() -> None:
    measured = {"model", "residual", "x", "features", "gram", "distance", "distances"}
    modules = (attention, dimension, geometry, heads, loop_patterns, paths, periods_of, perturbed, similarity, reading,
               *LINEAR)
    probes = {
        name for module in modules for name, fn in inspect.getmembers(module, inspect.isfunction)
        if fn.__module__ == module.__name__ and not name.startswith("_")
        and measured & set(inspect.signature(fn).parameters)}
    helpers = {"states_by_loop", "cycle_coords"}
    assert probes <= {*PROBES, *helpers, "read_lens", "read_line"}


def _choices(model: HookedLoopMDM) -> dict[str, Any]:
    return VARIANTS["everything"] if model.config.conditioned else {}


def _variables(result: Result) -> dict[str, np.ndarray]:
    arrays = dict(result.data_vars) if isinstance(result, xr.Dataset) else {"value": result}
    return {str(name): array.to_numpy() for name, array in arrays.items()}
