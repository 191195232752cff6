"""Probes of values, of the loop, of another loop's states, and the online code: by hand, planted and shuffled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from hooks import HookedLoopMDM
from probes import probe_latent
from probes.linear import LogisticProbe, RidgeProbe, online_code, probe_loop, probe_values, site_features, transfer
from probes.linear.held_out import held_out
from tests.small import MASK, small_model

LOOPS, N_POS = 3, 8
ALL = torch.zeros(N_POS, dtype=torch.long)


def model_and_tokens(n: int = 160) -> tuple[HookedLoopMDM, Tensor]:
    return small_model(), torch.randint(0, MASK, (n, N_POS), generator=torch.Generator().manual_seed(5))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_planted_value_is_read_from_where_it_is_written() -> None:
    model, tokens = model_and_tokens()
    values = random(*tokens.shape, seed=1)
    plant = ("blocks.1.hook_resid_post@1", lambda x, hook: x + 30 * values[..., None] * random(16, seed=2))
    with model.hooks([plant], n_loops=LOOPS):
        found = probe_values(model, tokens, values, n_loops=LOOPS)
    depth = found.r2.where((found.layer == 1) & (found.loop == 1), drop=True)
    assert float(depth.squeeze()) > 0.98
    before = found.r2.isel(depth=slice(0, int(depth.depth.squeeze())))
    assert float(before.max()) < 0.05
    assert float(found.control_r2.max()) < 0.05
    assert (found.r2_low <= found.r2).all()
    assert (found.r2 <= found.r2_high).all()


def test_r2_is_the_definition_worked_by_hand() -> None:
    model, tokens = model_and_tokens(60)
    values = (tokens.double() ** 2).masked_fill(tokens == 1, torch.nan)
    found = probe_values(model, tokens, values, n_loops=LOOPS, seed=4)
    judged = held_out(60, 0.25, 4)
    features, _, _ = site_features(model, tokens, n_loops=LOOPS)
    x, y = features[2].view(60, N_POS, -1).double(), values
    fit, test = ~y.isnan() & ~judged[:, None], ~y.isnan() & judged[:, None]
    size, shift = x[fit].square().mean().sqrt(), x[fit].mean(0)
    a = (x[fit] - shift) / size
    w = torch.linalg.solve(a.mT @ a + torch.eye(16), a.mT @ (y[fit] - y[fit].mean()))
    error = y[test] - (x[test] - shift) / size @ w - y[fit].mean()
    expected = 1 - error.square().sum() / (y[test] - y[fit].mean()).square().sum()
    assert float(found.r2.isel(depth=2, group=0)) == pytest.approx(float(expected), rel=1e-4)
    example = int(found.example[0])
    own = test.nonzero()[:, 0] == example
    assert float(found.square_error.isel(depth=2, group=0, example=0)) == pytest.approx(
        float(error[own].square().mean()), rel=1e-4)
    with pytest.raises(ValueError, match="all values are the same"):
        probe_values(model, tokens, torch.ones_like(values), n_loops=LOOPS)


def test_differences_of_loops_read_what_a_loop_wrote_and_not_what_was_there() -> None:
    model, tokens = model_and_tokens()
    early, late = (torch.randint(0, 2, tokens.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    a, b = 40 * random(16, seed=3), 40 * random(16, seed=4)
    before = random(*tokens.shape, 16, seed=5) + early[..., None] * a
    after = before + random(*tokens.shape, 16, seed=6) + late[..., None] * b
    plants = [("blocks.2.hook_resid_post@0", lambda x, hook: before),
              ("blocks.2.hook_resid_post@1", lambda x, hook: after)]
    with model.hooks(plants, n_loops=2):
        states, changes = ({name: probe_latent(model, tokens, labels, 2, n_loops=2, groups=ALL, difference=difference)
                            for name, labels in (("early", early), ("late", late))} for difference in (False, True))
    assert set(changes["early"].loop.values.tolist()) == {1}

    def there(found: xr.Dataset) -> float:
        return float(found.accuracy.values[(found.layer == 2) & (found.loop == 1)].item())

    assert there(states["early"]) > 0.95
    assert there(states["late"]) > 0.95
    assert there(changes["late"]) > 0.95
    assert there(changes["early"]) < 0.65                          # it was there before, and stays
    with pytest.raises(ValueError, match="differences of loops need two loops"):
        probe_latent(model, tokens, early, 2, n_loops=1, groups=ALL, difference=True)


def test_transfer_is_a_probe_fitted_there_and_scored_here() -> None:
    model, tokens = model_and_tokens(80)
    labels = torch.where(tokens == 0, -1, tokens % 2)
    found = transfer(model, tokens, labels, n_loops=LOOPS, probe=RidgeProbe(), seed=2)
    features, _, _ = site_features(model, tokens, n_loops=LOOPS)
    judged = held_out(80, 0.25, 2)
    fit, test = (labels >= 0) & ~judged[:, None], (labels >= 0) & judged[:, None]
    for i, j in ((0, 0), (1, 4), (4, 1)):
        theirs = RidgeClassifier().fit(features.at(fit)[i].double().numpy(), labels[fit].numpy())
        assert float(found.accuracy[i, j]) == pytest.approx(
            theirs.score(features.at(test)[j].double().numpy(), labels[test].numpy()), rel=1e-6)
    own = probe_latent(model, tokens, labels, 2, n_loops=LOOPS, groups=ALL, probe=RidgeProbe(), seed=2)
    np.testing.assert_allclose(np.diagonal(found.accuracy), own.accuracy[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found.right.mean("example"), found.accuracy, atol=0.05)


def test_a_direction_that_is_kept_transfers_and_one_that_turns_does_not() -> None:
    model, tokens = model_and_tokens()
    labels = torch.randint(0, 2, tokens.shape, generator=torch.Generator().manual_seed(6))
    sign, first, second = (2.0 * labels - 1)[..., None], random(16, seed=7), random(16, seed=8)
    second = second - (second @ first) / (first @ first) * first                                 # at a right angle
    first, second = 60 * first / first.norm(), 60 * second / second.norm()
    for vectors, kept in (((first, first), True), ((first, second), False)):
        plants = [(f"blocks.2.hook_resid_post@{k}", lambda x, hook, v=v: x * 0 + x.detach().mean() + sign * v
                   + random(*x.shape, seed=9)) for k, v in enumerate(vectors)]
        with model.hooks(plants, n_loops=2):
            found = transfer(model, tokens, labels, n_loops=2)
        places = found.depth.values[found.layer.values == 2]
        assert found.accuracy.sel(trained_depth=places[0], depth=places[0]) > 0.98
        assert found.accuracy.sel(trained_depth=places[1], depth=places[1]) > 0.98
        away = float(found.accuracy.sel(trained_depth=places[0], depth=places[1]))
        assert away > 0.98 if kept else abs(away - 0.5) < 0.1


def test_the_loop_is_told_from_a_mark_and_not_from_states_that_stand_still() -> None:
    model, tokens = model_and_tokens(64)
    marks = 20 * random(LOOPS, 16, seed=3)
    noise = random(LOOPS, *tokens.shape, 16, seed=4)
    everywhere = torch.ones_like(tokens, dtype=torch.bool)

    def written(state: Callable[[int], Tensor]) -> list[Any]:
        return [(f"blocks.2.hook_resid_post@{k}", lambda x, hook, k=k: state(k)) for k in range(LOOPS)]

    for plants, least, most in ((written(lambda k: noise[k] + marks[k]), 0.99, 1.0),
                                (written(lambda k: noise[k]), 0.2, 0.45)):
        with model.hooks(plants, n_loops=LOOPS):
            found = probe_loop(model, tokens, where=everywhere, n_loops=LOOPS)
        assert least <= float(found.accuracy.sel(layer=2)) <= most
        np.testing.assert_allclose(found.confusion.sum("told"), 1, rtol=1e-6)
        confusion = found.confusion.sel(layer=2)
        np.testing.assert_allclose(np.trace(confusion) / LOOPS, found.accuracy.sel(layer=2), rtol=1e-6)
        assert float(found.chance) == pytest.approx(1 / LOOPS)
    with model.hooks(written(lambda k: noise[k] * 10 ** k), n_loops=LOOPS):
        found = probe_loop(model, tokens, where=everywhere, n_loops=LOOPS)
    assert float(found.accuracy.sel(layer=2)) < 0.45                   # a stream that only grows does not give it away
    with pytest.raises(ValueError, match="runs 1 here"):
        probe_loop(model, tokens, n_loops=1)


def test_the_online_code_is_the_sum_of_its_portions() -> None:
    model, tokens = model_and_tokens(40)
    labels = torch.where(tokens == 0, -1, tokens % 3)
    found = online_code(model, tokens, labels, 3, n_loops=LOOPS, probe=LogisticProbe(C=0.5, tol=1e-8),
                        portions=(0.25, 0.5, 1.0), seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    features, _, _ = site_features(model, tokens, n_loops=LOOPS)
    x = features[3].view(40, N_POS, -1).double().numpy()
    y = labels.numpy()
    bits = np.log2(3) * (y[order[:10]] >= 0).sum()
    for start, end in ((10, 20), (20, 40)):
        seen, now = order[:start].numpy(), order[start:end].numpy()
        theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(x[seen][y[seen] >= 0], y[seen][y[seen] >= 0])
        p = theirs.predict_proba(x[now][y[now] >= 0])[np.arange((y[now] >= 0).sum()), y[now][y[now] >= 0]]
        bits -= np.log2((1 - 1e-3) * p + 1e-3 / 3).sum()
    assert float(found.code_length[3]) == pytest.approx(bits / (y >= 0).sum(), rel=2e-3)
    assert float(found.compression[3]) == pytest.approx(np.log2(3) / float(found.code_length[3]), rel=1e-6)
    assert (found.low <= found.code_length).all()
    assert (found.code_length <= found.high).all()


def test_the_code_of_what_is_there_is_short_and_of_shuffled_labels_is_not() -> None:
    model, tokens = model_and_tokens()
    found = online_code(model, tokens, tokens % 2, 2, n_loops=LOOPS)
    assert float(found.code_length[0]) < 0.35
    assert float(found.compression[0]) > 2.5
    assert (found.control_code_length > 0.98).all()
    each_its_own = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masked = online_code(model, tokens, torch.where(each_its_own, tokens % 2, -1), 2, n_loops=LOOPS)
    assert float(masked.code_length[0]) < 0.5
    assert (masked.control_code_length > 0.98).all()
    with pytest.raises(ValueError, match="portions must grow to 1"):
        online_code(model, tokens, tokens % 2, 2, n_loops=LOOPS, portions=(0.5, 0.2, 1.0))
    with pytest.raises(ValueError, match="first portion has no labelled position"):
        online_code(model, tokens, torch.where(torch.arange(160)[:, None] >= 0, -1, tokens), MASK, n_loops=LOOPS)
