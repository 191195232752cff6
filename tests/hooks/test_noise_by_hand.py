"""Noise levels where a mistake leaves everything running: the sampler's rates, and what conditioning is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks.model.diffusion import SamplerConfig, sample
from tests.small import MASK, small_model

N_POS = 100
BATCH = 40


@pytest.mark.parametrize("n_steps", [3, 5])
def test_ancestral_sampling_reveals_each_masked_position_with_the_probability_of_its_step(n_steps: int) -> None:
    """From t to s it is 1 − s/t: of n steps the j-th reveals 1/(n − j) of what is still masked, j from 0."""
    model = small_model(max_seq_len=N_POS)
    trace = sample(model, torch.full((BATCH, N_POS), MASK), SamplerConfig(n_steps=n_steps, n_loops=1),
                   generator=torch.Generator().manual_seed(0))
    assert [step.t for step in trace] == pytest.approx([1 - j / n_steps for j in range(n_steps)])
    for j, step in enumerate(trace):
        masked = step.before == MASK
        count, p = int(masked.sum()), 1 / (n_steps - j)
        assert abs(float(step.revealed[masked].float().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / count), j
        if p < 1:   # each position for itself: the numbers per example spread as a binomial's do
            spread = float(step.revealed.sum(1).float().var() / (p * (1 - p) * masked.sum(1).float().mean()))
            assert 0.5 < spread < 2


@pytest.mark.parametrize("n_steps", [3, 5])
def test_confident_sampling_reveals_the_same_share_of_every_example(n_steps: int) -> None:
    trace = sample(small_model(max_seq_len=N_POS), torch.full((4, N_POS), MASK),
                   SamplerConfig(n_steps=n_steps, n_loops=1, order="confidence"), generator=torch.Generator())
    for j, step in enumerate(trace):
        left = (step.before == MASK).sum(1)
        assert step.revealed.sum(1).tolist() == [math.ceil(int(n) / (n_steps - j) - 1e-6) for n in left]


def told(kind: str, t: float) -> float:
    """The level that a model conditioned on time is told; −log(1 − t) stops at t = 1 − 1e-4."""
    return {"t": 1000 * t, "sigma": -math.log1p(-min(t, 1 - 1e-4)), "constant": 0.0}[kind]


@pytest.mark.parametrize("kind", ["t", "sigma", "constant"])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9999, 1.0])
def test_conditioning_is_on_the_level_by_its_formula_and_finite_up_to_1(kind: str, t: float) -> None:
    model = small_model(time_conditioning=kind)
    tokens = torch.full((2, 9), MASK)
    expected = model.time_embed(torch.full((2,), told(kind, t)))
    for level in (t, torch.full((2,), t)):
        torch.testing.assert_close(model.condition(tokens, level), expected, rtol=1e-3, atol=1e-4)
        assert torch.isfinite(model(tokens, 2, t=level)).all()


@pytest.mark.parametrize("kind", ["t", "sigma"])
def test_without_a_level_each_example_is_told_its_share_of_masks(kind: str) -> None:
    model = small_model(time_conditioning=kind)
    tokens = torch.ones(3, 8, dtype=torch.long)
    tokens[1, :2], tokens[2] = MASK, MASK   # none, a quarter, all
    expected = model.time_embed(torch.tensor([told(kind, share) for share in (0.0, 0.25, 1.0)]))
    torch.testing.assert_close(model.condition(tokens), expected, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(model(tokens, 2)).all()


def test_the_sampler_starts_at_level_1_and_tells_each_steps_level() -> None:
    model = small_model(time_conditioning="sigma")
    prompt = torch.full((2, 9), MASK)
    seen: list[float] = []
    condition = model.condition

    def noted(tokens: Tensor, t: float, *rest: Any) -> Tensor | None:
        seen.append(t)
        return condition(tokens, t, *rest)

    model.condition = noted  # type: ignore[method-assign]
    trace = sample(model, prompt, SamplerConfig(n_steps=4), generator=torch.Generator().manual_seed(0))
    assert seen == pytest.approx([1, 0.75, 0.5, 0.25])
    assert all(torch.isfinite(step.probability).all() for step in trace)
