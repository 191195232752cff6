"""Kinds of heads: by a naive loop over queries and keys, planted patterns, and chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks.edits import freeze
from probes.attention import attention_summary, patterns
from probes.heads import attention_over_steps, head_kinds
from tests.small import MASK, small_model
from tests.specimens import SPECIMENS

LOOPS, POS = 3, 8


def given() -> Tensor:
    tokens = torch.randint(0, 3, (5, POS), generator=torch.Generator().manual_seed(3))
    return torch.where(torch.arange(POS) % 3 == 0, MASK, tokens)


def test_shares_are_those_of_a_loop_over_queries() -> None:
    model, tokens = small_model(seed=2), given()
    where = torch.arange(POS).expand(5, POS) > 1
    found = head_kinds(model, tokens, n_loops=LOOPS, where=where)
    whole = patterns(model, tokens, n_loops=LOOPS).values                         # [depth, batch, head, query, key]
    for depth, example, head in ((0, 0, 0), (3, 2, 1), (6, 4, 0)):
        a, x = whole[depth, example, head], tokens[example]
        means: dict[str, list[tuple[float, float]]] = {name: [] for name in ("self", "previous", "next", "same_token",
                                                                            "distance")}
        for q in range(2, POS):
            for name, keys in (("self", [q]), ("previous", [q - 1]), ("next", [q + 1] if q + 1 < POS else []),
                               ("same_token", [k for k in range(POS) if k != q and x[k] == x[q] != MASK])):
                if keys:
                    means[name].append((a[q, keys].sum(), len(keys) / POS))
            means["distance"].append((sum(a[q, k] * abs(q - k) for k in range(POS)),
                                      np.mean([abs(q - k) for k in range(POS)])))
        for name, values in means.items():
            share, chance = np.mean(values, 0) if values else (np.nan, np.nan)
            place = {"depth": depth, "head": head, "example": example}
            np.testing.assert_allclose(found[name].isel(place), share, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found[f"{name}_over_chance"].isel(place), share / chance, rtol=1e-4)
    loops = model.topology(LOOPS).loop_depths()
    apart = np.abs(whole[loops[2][1]] - whole[loops[1][1]]).sum(-1)[..., 2:].mean(-1) / 2
    np.testing.assert_allclose(found.stability[loops[2][1]], 1 - apart.T, rtol=1e-4)
    assert np.isnan(found.stability[0]).all()
    assert np.isnan(found.stability[loops[0][0]]).all()


def test_planted_heads_are_what_they_are() -> None:
    model, tokens = small_model(seed=2), given()
    previous = torch.eye(POS).roll(-1, 1)                                      # the key before; the first looks last
    uniform = torch.full((POS, POS), 1 / POS)

    def plant(pattern: Tensor, hook: object) -> Tensor:
        return torch.stack([previous, uniform]).expand_as(pattern).contiguous()

    with model.hooks([("blocks.1.attn.hook_pattern", plant)], n_loops=LOOPS):
        found = head_kinds(model, tokens, n_loops=LOOPS)
    here = found.isel(depth=model.topology(LOOPS).loop_depths()[1][0])
    np.testing.assert_allclose(here.previous.sel(head=0), 1, atol=1e-6)
    np.testing.assert_allclose(here.previous_over_chance.sel(head=0), POS, rtol=1e-5)
    np.testing.assert_allclose(here.next.sel(head=0), 0, atol=1e-6)
    for name in ("self", "previous", "next", "same_token", "distance"):
        np.testing.assert_allclose(here[f"{name}_over_chance"].sel(head=1), 1, rtol=1e-5)
    np.testing.assert_allclose(here.stability, 1, rtol=1e-6)


def test_a_frozen_pattern_is_stable_and_others_are_less() -> None:
    model, tokens = small_model(seed=2), given()
    with model.hooks([freeze(0)], n_loops=LOOPS):
        frozen = head_kinds(model, tokens, n_loops=LOOPS).stability
    free = head_kinds(model, tokens, n_loops=LOOPS).stability
    np.testing.assert_allclose(frozen.where(frozen.notnull(), 1), 1, rtol=1e-6)
    assert float(free.min()) < 0.99


@pytest.mark.parametrize("name", [name for name in SPECIMENS if SPECIMENS[name]().attention])
def test_every_model_with_patterns_has_kinds(name: str) -> None:
    specimen = SPECIMENS[name]()
    found = head_kinds(specimen.model, specimen.inputs, n_loops=specimen.n_loops)
    assert np.isfinite(found.self).all()
    assert ((found.self >= 0) & (found.self <= 1)).all()


def test_steps_stand_side_by_side() -> None:
    model, tokens = small_model(seed=2), given()
    steps = [torch.full_like(tokens, MASK), tokens]
    found = attention_over_steps(model, steps, n_loops=LOOPS)
    for i, step in enumerate(steps):
        alone = attention_summary(model, step, n_loops=LOOPS, per_example=True)
        np.testing.assert_array_equal(found.sink_rate[i], alone.sink_rate)
    assert found.sink_rate.dims == ("step", "depth", "example", "head")
    with pytest.raises(ValueError, match="give at least one step"):
        attention_over_steps(model, [])
    with pytest.raises(ValueError, match="where has shape"):
        head_kinds(model, tokens, n_loops=2, where=torch.ones(2, 2, dtype=torch.bool))
