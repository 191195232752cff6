"""Masked diffusion: masking rates, the bound against a naive loop, the samplers' promises."""

from __future__ import annotations

import math

import pytest
import torch

from hooks.model.diffusion import SamplerConfig, antithetic_t, corrupt, nelbo, sample
from tests.small import MASK, small_model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_levels_are_spread_evenly_and_reproducible():
    t = antithetic_t(50, generator=seeded())
    assert torch.equal(t, antithetic_t(50, generator=seeded()))
    assert ((t > 0) & (t <= 1)).all()
    counts = torch.histc(t, bins=10, min=0, max=1)
    assert (counts - 5).abs().max() <= 1, "one level per fiftieth of (0, 1]"
    assert not torch.equal(t, t.sort().values)


def test_corrupt_masks_free_positions_at_rate_t():
    tokens = torch.zeros(4000, 20, dtype=torch.long)
    free = torch.zeros(4000, 20, dtype=torch.bool)
    free[:, 5:] = True
    noised = corrupt(tokens, 0.3, MASK, free=free, generator=seeded())
    assert (noised[:, :5] == 0).all()
    rate = (noised[:, 5:] == MASK).float().mean()
    assert rate == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 60_000))
    assert (corrupt(tokens, 1.0, MASK, free=free, generator=seeded())[:, 5:] == MASK).all()


def test_nelbo_equals_a_naive_loop():
    tokens = torch.randint(0, MASK, (3, 8), generator=seeded())
    t = torch.tensor([0.2, 0.7, 1.0])
    noised = corrupt(tokens, t, MASK, generator=seeded(1))
    logits = torch.randn(3, 8, 7, generator=seeded(2))
    total = 0.0
    for b in range(3):
        for i in range(8):
            if noised[b, i] == MASK:
                total -= logits[b, i].log_softmax(-1)[tokens[b, i]].item() / t[b].item()
    assert nelbo(logits, tokens, noised, t, MASK).item() == pytest.approx(total / 24, rel=1e-5)


def test_nelbo_of_a_uniform_guess_is_log_of_the_vocabulary():
    tokens = torch.randint(0, 4, (4000, 10), generator=seeded())
    t = antithetic_t(4000, generator=seeded(1)).clamp_min(0.05)
    noised = corrupt(tokens, t, 4, generator=seeded(2))
    logits = torch.zeros(4000, 10, 5)
    logits[..., 4] = -1e6
    assert nelbo(logits, tokens, noised, t, 4).item() == pytest.approx(math.log(4), rel=0.02)


@pytest.mark.parametrize("order", ["ancestral", "confidence"])
@pytest.mark.parametrize("n_steps", [1, 3, 9])
def test_sampling_fills_everything_and_never_changes_what_is_revealed(order, n_steps):
    model = small_model()
    prompt = torch.full((4, 9), MASK)
    prompt[:, :2] = 3
    seen = []
    trace = sample(model, prompt, SamplerConfig(n_steps=n_steps, order=order, n_loops=2), generator=seeded(),
                   on_step=seen.append)
    assert seen == trace
    assert len(trace) == n_steps
    assert (trace[-1].after != MASK).all()
    assert (trace[-1].after[:, :2] == 3).all()
    for step in trace:
        visible = step.before != MASK
        assert torch.equal(step.after[visible], step.before[visible])
        assert (step.loops_used == 2).all()
    assert (sum(step.revealed.int() for step in trace) == (prompt == MASK)).all()


def test_confidence_order_reveals_the_most_probable_positions_evenly():
    model = small_model()
    trace = sample(model, torch.full((5, 9), MASK), SamplerConfig(n_steps=3, order="confidence", temperature=0),
                   generator=seeded())
    for step in trace:
        assert (step.revealed.sum(1) == 3).all()
        for probability, revealed, masked in zip(step.probability, step.revealed, step.before == MASK, strict=True):
            rest = probability[masked & ~revealed]
            assert rest.numel() == 0 or probability[revealed].min() >= rest.max()


def test_temperature_zero_takes_the_models_argmax_and_seeds_repeat():
    model = small_model()
    prompt = torch.full((2, 9), MASK)
    step = sample(model, prompt, SamplerConfig(n_steps=1, temperature=0))[0]
    assert torch.equal(step.after, model(prompt, t=1.0).argmax(-1))
    runs = [sample(model, prompt, SamplerConfig(n_steps=4), generator=seeded(s))[-1].after for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_adaptive_looping_reports_loops_used_at_each_step():
    model = small_model()
    config = SamplerConfig(n_steps=2, n_loops=30, exit_threshold=0.3, temperature=0)
    trace = sample(model, torch.full((3, 9), MASK), config)
    for step in trace:
        _, used = model.forward_adaptive(step.before, threshold=0.3, max_loops=30, t=step.t)
        assert torch.equal(step.loops_used, used)
    assert any((step.loops_used < 30).any() for step in trace)


@pytest.mark.parametrize(("bad", "message"), [({"n_steps": 0}, "n_steps must be at least 1"),
                                              ({"order": "left"}, "'ancestral' or 'confidence'"),
                                              ({"temperature": -1.0}, "temperature must be at least 0")])
def test_impossible_samplers_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**bad)
