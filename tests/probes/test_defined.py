"""Every probe on what has no ordinary answer: states that never change, NaN weights, one example.

What comes back is finite where the probe's docstring does not say otherwise; what cannot be measured raises an error
that says why. Warnings are errors in every test run, so that none of this divides by zero on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from hooks import HookedLoopMDM
from probes import (
    attention_summary,
    cka_between_depths,
    classify_tokens,
    contraction,
    dynamics,
    effective_rank,
    fixed_point,
    linear_cka,
    matrix_entropy,
    patterns,
    probe_latent,
    read_lens,
    ridge_probes,
    trajectory_pca,
)
from probes.attention import pattern_distance
from probes.causal import causal_scan
from probes.cycles import own_loops
from probes.exchange import exchange
from probes.gains import gains
from probes.geometry import growth
from probes.loop_patterns import frozen_attention, head_distances, pattern_gram
from probes.responses import responses
from tests.small import MASK, small_model, small_tokens

LOOPS = 8
Found = xr.Dataset | xr.DataArray | Tensor


def residual(model: HookedLoopMDM, tokens: Tensor) -> tuple[xr.DataArray, Any]:
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, LOOPS, names_filter="blocks.*.hook_resid_post")
    return rec.residual_stream(), rec.topology


def truth(tokens: Tensor) -> Tensor:
    return (tokens + 1) % MASK


def moves(model: HookedLoopMDM, tokens: Tensor) -> xr.Dataset:
    return dynamics(*residual(model, tokens), fixed_point=fixed_point(model, tokens, n_loops=12))


def cycle(model: HookedLoopMDM) -> Any:
    return own_loops(model.topology(3))


def states(model: HookedLoopMDM, tokens: Tensor) -> Tensor:
    return torch.from_numpy(residual(model, tokens)[0].values).flatten(1, 2)


PROBES: dict[str, Callable[[HookedLoopMDM, Tensor], Found]] = {
    "logit lens": lambda m, x: read_lens(m, x, n_loops=LOOPS, targets=truth(x)),
    "coda lens": lambda m, x: read_lens(m, x, n_loops=LOOPS, kind="coda", targets=truth(x)),
    "probe_latent": lambda m, x: probe_latent(m, x, x % 2, 2, n_loops=LOOPS, groups=torch.zeros(9, dtype=torch.long)),
    "ridge_probes": lambda m, x: ridge_probes(states(m, x), x.flatten() % 2, 2, train=torch.arange(x.numel()) % 3 > 0),
    "dynamics": moves,
    "fixed_point": lambda m, x: fixed_point(m, x, n_loops=12),
    "contraction": lambda m, x: contraction(moves(m, x).distance_to_fixed_point),
    "growth": lambda m, x: growth(moves(m, x).distance_to_fixed_point),
    "classify_tokens": lambda m, x: classify_tokens(*residual(m, x)),
    "trajectory_pca": lambda m, x: trajectory_pca(residual(m, x)[0]),
    "effective_rank": lambda m, x: effective_rank(residual(m, x)[0]),
    "matrix_entropy": lambda m, x: matrix_entropy(residual(m, x)[0]),
    "patterns": lambda m, x: patterns(m, x, n_loops=LOOPS),
    "attention_summary": lambda m, x: attention_summary(m, x, n_loops=LOOPS),
    "pattern_distance": lambda m, x: pattern_distance(m, x, n_loops=LOOPS),
    "linear_cka": lambda m, x: linear_cka(states(m, x)[0], states(m, x)[-1]),
    "cka_between_depths": lambda m, x: cka_between_depths(residual(m, x)[0]),
    "head_distances": lambda m, x: head_distances(pattern_gram(m, x, cycle(m))),
    "frozen_attention": lambda m, x: frozen_attention(m, x, cycle(m), after=1),
    "causal_scan": lambda m, x: causal_scan(m, x, targets=truth(x), effects=("skip", "repeat")),
    "exchange": lambda m, x: exchange(m, x, cycle(m)),
    "gains": lambda m, x: gains(m, x, cycle(m), targets=truth(x)),
    "responses": lambda m, x: responses(m, x, cycle(m)),
}

UNDEFINED = {
    "step_norm": "no loop before", "step_relative": "no loop before", "step_cosine": "no step to compare with",
    "step_cosine_unit": "no step to compare with", "acceleration": "no step before",
    "exponential": "law is undefined", "exponential_r2": "law is undefined", "power": "law is undefined",
    "power_r2": "law is undefined", "r2": "law is undefined",
    "cosine": "a place without a response", "cos_input": "a place without a response",
    "cos_loop": "no place has a response", "cos_layer": "no place has a response", "E": "no place has a response",
    "rho": "no place has a response",
    "prefix": "not scored", "right": "not scored", "repeat": "not scored", "suffix": "not scored",
    "line": "not scored, or fewer than 3 loops", "skip": "not scored", "prior": "not scored",
}
"""Variables that may be NaN, as their docstrings say, and why."""


def constant_model() -> HookedLoopMDM:
    """Every state is the same at every depth, position and example: one embedding, and layers that add nothing."""
    model = small_model()
    with torch.no_grad():
        model.embed.weight[:] = model.embed.weight[0].clone()
        for block in model.blocks:
            for parameter in (block.attn.out.weight, block.attn.out.bias, block.mlp.down.weight, block.mlp.down.bias):
                if parameter is not None:
                    parameter.zero_()
    return model


def zero_model() -> HookedLoopMDM:
    """Every state is 0."""
    model = constant_model()
    with torch.no_grad():
        model.embed.weight.zero_()
    return model


def checked(found: Found) -> None:
    if isinstance(found, Tensor):
        assert torch.isfinite(found).all()
        return
    dataset = found.to_dataset(name="value") if isinstance(found, xr.DataArray) else found
    for name, variable in dataset.data_vars.items():
        values = variable.values
        if values.dtype.kind == "f" and name not in UNDEFINED:
            assert np.isfinite(values).all(), name
        else:
            assert not np.isinf(values.astype(float)).any(), name


@pytest.mark.parametrize("make", [constant_model, zero_model])
@pytest.mark.parametrize("name", PROBES)
def test_states_that_never_change_have_defined_values(name: str, make: Callable[[], HookedLoopMDM]) -> None:
    checked(PROBES[name](make(), small_tokens(batch=6)))


@pytest.mark.parametrize("where", ["embed.weight", "unembed"])
@pytest.mark.parametrize("name", PROBES)
def test_nan_weights_are_an_error_that_says_so(name: str, where: str) -> None:
    model = small_model()
    with torch.no_grad():
        if where == "unembed":
            model.unembed_weight.fill_(torch.nan)
        else:
            model.get_parameter(where).fill_(torch.nan)
    tokens = small_tokens(batch=6)
    if where == "unembed" and name not in {"logit lens", "coda lens", "exchange", "gains", "frozen_attention",
                                           "causal_scan"}:
        checked(PROBES[name](model, tokens))   # it reads no answers
        return
    with pytest.raises(ValueError, match=r"NaN or infinite"):
        PROBES[name](model, tokens)


NEED_MORE = {"probe_latent": "give more examples", "exchange": "at least two examples",
             "gains": "at least two examples", "responses": "there is 1"}


@pytest.mark.parametrize("name", PROBES)
def test_one_example_is_measured_or_refused(name: str) -> None:
    tokens = small_tokens(batch=1)
    if name in NEED_MORE:
        with pytest.raises(ValueError, match=NEED_MORE[name]):
            PROBES[name](small_model(), tokens)
    else:
        checked(PROBES[name](small_model(), tokens))
