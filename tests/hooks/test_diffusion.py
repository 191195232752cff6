"""Masked diffusion: masking rates, the bound against a naive loop, the samplers' promises."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from hooks.model.diffusion import SamplerConfig, antithetic_t, corrupt, corrupt_exactly, exact_t, nelbo, sample
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


def test_exact_sizes_are_even_over_the_batch_and_uniform():
    n_free = torch.full((400,), 8)
    k = (exact_t(n_free, generator=seeded()) * n_free).round().long()
    assert torch.bincount(k, minlength=9).tolist() == [0] + [50] * 8, "as often each, from 1 to n"
    assert not torch.equal(k, k.sort().values)
    assert (exact_t(torch.ones(50, dtype=torch.long), generator=seeded()) == 1).all()
    mixed = torch.tensor([1, 2, 3, 7] * 30)
    k = exact_t(mixed, generator=seeded(1)) * mixed
    torch.testing.assert_close(k, k.round())
    assert ((k >= 1) & (k <= mixed)).all()
    with pytest.raises(ValueError, match="at least one free position"):
        exact_t(torch.tensor([3, 0]))


def test_exact_masks_hide_as_many_free_tokens_as_they_say_each_choice_alike():
    tokens = torch.zeros(6000, 7, dtype=torch.long)
    free = torch.zeros(6000, 7, dtype=torch.bool)
    free[:, 2:6] = True
    t = torch.tensor([0.25, 0.5, 1.0]).repeat(2000)
    noised = corrupt_exactly(tokens, t, MASK, free=free, generator=seeded()) == MASK
    assert not (noised & ~free).any()
    assert noised.sum(1).tolist() == [1, 2, 4] * 2000
    codes = (noised[1::3, 2:6].long() * torch.tensor([8, 4, 2, 1])).sum(1)
    counts = torch.bincount(codes, minlength=16)[[3, 5, 6, 9, 10, 12]]
    assert counts.sum() == 2000, "two of four"
    assert (counts - 2000 / 6).abs().max() < 4 * math.sqrt(2000 / 6), "every pair as often"
    assert (corrupt_exactly(tokens[:2], torch.ones(2), MASK) == MASK).all()


def test_the_bound_is_the_same_with_exact_masks_for_any_model():
    """Over all masks of five tokens: the integral over t of the Bernoulli bound, against the mean over sizes."""
    n, vocab = 5, 4
    tokens = torch.randint(0, vocab - 1, (1, n), generator=seeded())
    masks = [mask for size in range(1, n + 1) for mask in combinations(range(n), size)]
    logits = {mask: torch.randn(1, n, vocab, generator=seeded(i), dtype=torch.float64) for i, mask in enumerate(masks)}

    def at(mask: tuple[int, ...], t: float) -> float:
        noised = tokens.clone()
        noised[0, list(mask)] = vocab - 1
        return float(nelbo(logits[mask], tokens, noised, torch.tensor([t], dtype=torch.float64), vocab - 1))

    exact = sum(at(mask, len(mask) / n) / n / math.comb(n, len(mask)) for mask in masks)
    nodes = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    bernoulli = sum(at(mask, 1.0) * float((nodes ** (len(mask) - 1) * (1 - nodes) ** (n - len(mask))).mean())
                    for mask in masks)   # weight 1/t times the probability of the mask
    assert exact == pytest.approx(bernoulli, rel=1e-6)
    draws = 40_000
    many = tokens.expand(draws, -1)
    estimates = []
    for t, corruption in ((exact_t(torch.full((draws,), n), generator=seeded(1)), corrupt_exactly),
                          (antithetic_t(draws, generator=seeded(1)), corrupt)):
        noised = corruption(many, t, vocab - 1, generator=seeded(2))
        found = [tuple(row.nonzero()[:, 0].tolist()) for row in noised == vocab - 1]
        given = torch.stack([logits[mask][0] if mask else torch.zeros(n, vocab, dtype=torch.float64) for mask in found])
        estimates.append(float(nelbo(given, many, noised, t, vocab - 1)))
    assert estimates[0] == pytest.approx(exact, rel=0.01)
    assert estimates[1] == pytest.approx(exact, rel=0.05)


def test_bell_levels_favour_the_middle_evenly():
    t = antithetic_t(4000, levels="bell", generator=seeded())
    expected = [0.5 * (1 + math.erf(math.log(x / (1 - x)) / math.sqrt(2))) for x in (0.25, 0.5, 0.75)]
    assert [float((t < x).float().mean()) for x in (0.25, 0.5, 0.75)] == pytest.approx(expected, abs=2e-3)
    k = exact_t(torch.full((4000,), 5), levels="bell", generator=seeded()) * 5
    share = torch.histc(k, bins=5, min=0.5, max=5.5) / 4000
    assert share[2] > 1.5 * share[0]
    assert share[2] > 1.5 * share[4]


@pytest.mark.unchecked
def test_unknown_noise_levels_are_refused():
    with pytest.raises(ValueError, match="noise levels must be 'uniform' or 'bell', not 'flat'"):
        antithetic_t(4, levels="flat")


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


@pytest.mark.unchecked
@pytest.mark.parametrize(("bad", "message"), [({"n_steps": 0}, "n_steps must be at least 1"),
                                              ({"order": "left"}, "'ancestral' or 'confidence'"),
                                              ({"temperature": -1.0}, "temperature must be at least 0")])
def test_impossible_samplers_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**bad)
