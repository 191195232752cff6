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
    trajectory_pca,
)
from probes.attention import pattern_distance
from probes.causal import causal_scan
from probes.cycles import own_loops
from probes.dimension import intrinsic_dimension
from probes.exchange import exchange
from probes.gains import gains
from probes.geometry import growth
from probes.heads import head_kinds
from probes.linear import online_code, probe_loop, probe_values, transfer
from probes.loop_map import jacobian_spectrum, lyapunov
from probes.loop_patterns import frozen_attention, head_distances, pattern_gram
from probes.paths import head_scan, path_effects
from probes.periods import periods
from probes.perturbed import basins, line_search
from probes.responses import responses
from probes.similarity import between_depths
from tests.small import MASK, small_model, small_tokens

LOOPS = 8
Found = xr.Dataset | xr.DataArray | Tensor


def residual(model: HookedLoopMDM, tokens: Tensor) -> tuple[xr.DataArray, Any]:
    return recorded(model, tokens, LOOPS)


def recorded(model: HookedLoopMDM, tokens: Tensor, n_loops: int) -> tuple[xr.DataArray, Any]:
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops, names_filter="blocks.*.hook_resid_post")
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
    "probe_values": lambda m, x: probe_values(m, x, x.double(), n_loops=LOOPS),
    "transfer": lambda m, x: transfer(m, x, x % 2, n_loops=LOOPS),
    "probe_loop": lambda m, x: probe_loop(m, x, where=x >= 0, n_loops=LOOPS),
    "online_code": lambda m, x: online_code(m, x, x % 2, 2, n_loops=LOOPS, portions=(0.5, 1.0)),
    "jacobian_spectrum": lambda m, x: jacobian_spectrum(m, x, n_loops=LOOPS, n_iter=8),
    "lyapunov": lambda m, x: lyapunov(m, x, n_loops=LOOPS, n_iter=4),
    "line_search": lambda m, x: line_search(m, x, targets=truth(x), n_loops=LOOPS),
    "basins": lambda m, x: basins(m, x, n_loops=LOOPS, n_starts=1),
    "path_effects": lambda m, x: path_effects(m, x, targets=truth(x), n_loops=LOOPS),
    "head_scan": lambda m, x: head_scan(m, x, targets=truth(x), how="zero", n_loops=LOOPS),
    "head_kinds": lambda m, x: head_kinds(m, x, n_loops=LOOPS),
    "periods": lambda m, x: periods(*recorded(m, x, 8)),
    "intrinsic_dimension": lambda m, x: intrinsic_dimension(residual(m, x)[0]),
    "between_depths": lambda m, x: between_depths(residual(m, x)[0]),
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

UNDEFINED_IN = {
    "probe_latent": {"right": "an example without a label", "control_right": "an example without a label"},
    "path_effects": dict.fromkeys(("nll", "kl", "accuracy", "exact"), "the receiver is not later"),
    "head_kinds": dict.fromkeys(("stability", "same_token", "same_token_over_chance"), "no loop before, no such key"),
    "periods": dict.fromkeys(("period", "power", "chance_power", "winding"), "on a straight line"),
    "intrinsic_dimension": dict.fromkeys(("value", "low", "high"), "fewer than 10 different states"),
}
"""The same for variables of one probe, where another's of that name is always defined."""


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


def checked(found: Found, probe: str = "") -> None:
    if isinstance(found, Tensor):
        assert torch.isfinite(found).all()
        return
    dataset = found.to_dataset(name="value") if isinstance(found, xr.DataArray) else found
    for name, variable in dataset.data_vars.items():
        values = variable.values
        if values.dtype.kind == "f" and name not in UNDEFINED and name not in UNDEFINED_IN.get(probe, {}):
            assert np.isfinite(values).all(), name
        else:
            assert not np.isinf(values.astype(float)).any(), name


@pytest.mark.parametrize("make", [constant_model, zero_model])
@pytest.mark.parametrize("name", PROBES)
def test_states_that_never_change_have_defined_values(name: str, make: Callable[[], HookedLoopMDM]) -> None:
    checked(PROBES[name](make(), small_tokens(batch=6)), name)


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
                                           "causal_scan", "line_search", "basins", "path_effects", "head_scan"}:
        checked(PROBES[name](model, tokens), name)   # it reads no answers
        return
    with pytest.raises(ValueError, match=r"NaN or infinite"):
        PROBES[name](model, tokens)


NEED_MORE = {
    "probe_latent": "give more examples", "probe_values": "give more examples", "transfer": "give more examples",
    "probe_loop": "give more examples", "online_code": "portions must grow to 1 and split 1 examples",
    "line_search": "there is one: give more", "between_depths": "at least 5", "intrinsic_dimension": "at least 4",
    "exchange": "at least two examples", "gains": "at least two examples", "responses": "there is 1",
}


@pytest.mark.parametrize("name", PROBES)
def test_one_example_is_measured_or_refused(name: str) -> None:
    tokens = small_tokens(batch=1)
    if name in NEED_MORE:
        with pytest.raises(ValueError, match=NEED_MORE[name]):
            PROBES[name](small_model(), tokens)
    else:
        checked(PROBES[name](small_model(), tokens), name)
