"""Linear probes: scikit-learn's answers, planted variables found, absent ones not, held-out examples held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.linear_model import RidgeClassifier
from torch import Tensor

from hooks import HookedLoopMDM
from probes import linear, probe_latent, ridge_probes
from tests.small import MASK, small_model

N_LOOPS = 2
N_POS = 8
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def random_features(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 200, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1])[:, None, None] + 2
    direction = torch.randn(5, 3, generator=generator)
    labels = ((features[0] - 2) @ direction + torch.randn(200, 3, generator=generator)).argmax(1)
    return features, labels, torch.arange(200) % 3 > 0


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_ridge_probes_agree_with_scikit_learn(n_classes: int, ridge: float) -> None:
    features, labels, train = random_features()
    labels = labels.clamp(max=n_classes - 1)
    ours = ridge_probes(features, labels, n_classes, train=train, ridge=ridge)
    for site in range(3):
        x, y = features[site].double().numpy(), labels.numpy()
        theirs = RidgeClassifier(alpha=ridge, solver="cholesky").fit(x[train], y[train])
        np.testing.assert_array_equal(ours.prediction[site], theirs.predict(x))
        np.testing.assert_allclose(ours.accuracy[site], theirs.score(x[~train], y[~train]), rtol=1e-6)
        np.testing.assert_allclose(ours.train_accuracy[site], theirs.score(x[train], y[train]), rtol=1e-6)
    commonest = np.bincount(labels[train]).argmax()
    np.testing.assert_allclose(ours.majority, (labels[~train] == commonest).double().mean(), rtol=1e-6)
    assert (ours.accuracy_low < ours.accuracy).all()
    assert (ours.accuracy < ours.accuracy_high).all()


def test_wilsons_interval_agrees_with_scipy() -> None:
    features, labels, train = random_features()
    ours = ridge_probes(features, labels, 3, train=train)
    n_test = ours.attrs["n_test"]
    interval = binomtest(round(float(ours.accuracy[0]) * n_test), n_test).proportion_ci(method="wilson")
    np.testing.assert_allclose([ours.accuracy_low[0], ours.accuracy_high[0]], [interval.low, interval.high], rtol=1e-5)


def test_undefined_labels_are_neither_trained_on_nor_scored() -> None:
    features, labels, train = random_features()
    known = torch.arange(200) % 5 != 0
    with_holes = ridge_probes(features, torch.where(known, labels, -1), 3, train=train)
    without = ridge_probes(features[:, known], labels[known], 3, train=train[known])
    np.testing.assert_array_equal(with_holes.prediction[:, known.numpy()], without.prediction)
    np.testing.assert_array_equal(with_holes.accuracy, without.accuracy)
    assert with_holes.attrs == without.attrs


@pytest.mark.unchecked
@pytest.mark.parametrize(("changes", "message"), [
    ({"ridge": 0.0}, "ridge must be above 0"),
    ({"n_classes": 2}, r"labels hold 0..2; with n_classes=2 they are 0..1, and −1"),
    ({"train": torch.ones(200, dtype=torch.bool)}, "leave some out to test on"),
    ({"train": torch.zeros(200, dtype=torch.bool)}, "no labelled example is in the training set"),
    ({"train": torch.ones(100, dtype=torch.bool)}, r"features are \[site, example, d_model\]"),
])
def test_what_cannot_be_fitted_is_refused(changes: dict[str, Any], message: str) -> None:
    features, labels, train = random_features()
    options: dict[str, Any] = {"n_classes": 3, "train": train, **changes}
    with pytest.raises(ValueError, match=message):
        ridge_probes(features, labels, **options)


# ------------------------------------------------------------------ probe_latent

def model_and_tokens(n: int = 240) -> tuple[HookedLoopMDM, Tensor]:
    tokens = torch.randint(0, MASK, (n, N_POS), generator=torch.Generator().manual_seed(5))
    return small_model(), tokens


def test_a_planted_variable_is_found_where_it_is_and_only_there() -> None:
    model, tokens = model_and_tokens()
    planted = torch.randint(0, 3, tokens.shape, generator=torch.Generator().manual_seed(6))
    directions = torch.randn(3, 16, generator=torch.Generator().manual_seed(7)) * 20

    def plant(x: Tensor, hook: object) -> Tensor:
        return x + directions[planted]

    # It is written after layer 2 in loop 0, and so can be read there and not before; elsewhere it is noise.
    with model.hooks([("blocks.2.hook_resid_post@0", plant)], n_loops=N_LOOPS):
        found = probe_latent(model, tokens, planted, 3, n_loops=N_LOOPS, groups=GROUPS)
    assert found.accuracy.dims == ("depth", "group")
    assert (found.accuracy.isel(depth=2) > 0.99).all()
    assert (found.selectivity.isel(depth=2) > 0.3).all()
    for before in (0, 1):
        assert (found.accuracy_low.isel(depth=before) < 1 / 3 + 0.03).all()
        assert (abs(found.accuracy.isel(depth=before) - found.majority.isel(depth=before)) < 0.12).all()


def test_the_token_itself_is_read_from_the_first_layer_and_random_labels_are_not() -> None:
    model, tokens = model_and_tokens()
    token = probe_latent(model, tokens, tokens, MASK, n_loops=N_LOOPS, groups=GROUPS)
    assert (token.accuracy.isel(depth=0) > 0.8).all()
    labels = torch.randint(0, MASK, tokens.shape, generator=torch.Generator().manual_seed(8))
    chance = probe_latent(model, tokens, labels, MASK, n_loops=N_LOOPS, groups=GROUPS)
    assert (chance.accuracy < 0.3).all()
    np.testing.assert_allclose(token.selectivity, token.accuracy - token.control_accuracy, atol=1e-6)


def test_examples_and_not_positions_are_held_out() -> None:
    model, tokens = model_and_tokens(16)
    generator = torch.Generator().manual_seed(9)
    signature = 50 * torch.randn(16, 1, 16, generator=generator)          # in 16 dimensions any labels of 12 separate
    labels = torch.randint(0, 2, (16, 1), generator=generator).expand(16, N_POS)  # a random bit per example
    with model.hooks([("blocks.0.hook_resid_post", lambda x, hook: x + signature)], n_loops=N_LOOPS):
        results = [probe_latent(model, tokens, labels, 2, n_loops=N_LOOPS, groups=GROUPS, seed=seed)
                   for seed in range(12)]
    mean = np.mean([result.accuracy.isel(depth=0) for result in results])
    assert 0.25 < mean < 0.7         # with positions held out, a probe that knows the example would reach 1
    assert results[0].attrs["n_test_examples"] == 4
    assert results[0].n_test.values.tolist() == [4 * 4, 4 * 4]


def test_each_probe_is_the_one_that_scikit_learn_fits() -> None:
    model, tokens = model_and_tokens()
    labels = torch.where(tokens == 0, -1, tokens % 3)
    result = probe_latent(model, tokens, labels, 3, n_loops=N_LOOPS, groups=GROUPS, seed=3, hook="hook_mlp_out")
    held_out = linear._held_out(len(tokens), 0.25, torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, N_LOOPS, names_filter="blocks.*.hook_mlp_out")
    x = rec["blocks.1.hook_mlp_out@1"][:, 4:].double()
    y = labels[:, 4:]
    train, test = (y >= 0) & ~held_out[:, None], (y >= 0) & held_out[:, None]
    scale = x[train].square().mean().sqrt()
    theirs = RidgeClassifier(alpha=1.0).fit((x / scale)[train].numpy(), y[train].numpy())
    expected = theirs.score((x / scale)[test].numpy(), y[test].numpy())
    np.testing.assert_allclose(result.accuracy.isel(depth=3).sel(group=1), expected, rtol=1e-6)
    assert int(result.n_test.sel(group=1)) == int(test.sum())


def test_the_control_task_is_a_class_per_type_balanced_and_the_same_everywhere() -> None:
    positions = torch.arange(6).expand(10, 6)
    control = linear._control_labels(positions, 2, torch.Generator().manual_seed(0))
    assert control is not None
    assert (control == control[0]).all()
    assert torch.bincount(control[0]).tolist() == [3, 3]
    words = torch.randint(0, 9, (10, 6), generator=torch.Generator().manual_seed(1)) * 7
    by_word = linear._control_labels(words, 3, torch.Generator().manual_seed(0))
    assert by_word is not None
    assert all(len(by_word[words == word].unique()) == 1 for word in words.unique())
    assert linear._control_labels(positions[:, :1], 2, torch.Generator()) is None


def test_a_control_that_can_be_read_leaves_no_selectivity() -> None:
    model, tokens = model_and_tokens()
    # The types are the visible tokens: a class per token is as readable as the token, and so is the control.
    result = probe_latent(model, tokens, tokens % 2, 2, n_loops=N_LOOPS, groups=GROUPS, control_types=tokens)
    assert (result.control_accuracy.isel(depth=0) > 0.9).all()
    assert (abs(result.selectivity.isel(depth=0)) < 0.1).all()
    alone = probe_latent(model, tokens, tokens % 2, 2, n_loops=N_LOOPS, groups=torch.arange(N_POS) - 1)
    assert alone.group.values.tolist() == list(range(N_POS - 1))        # −1 is no group
    assert np.isnan(alone.control_accuracy).all()                       # one position, one type: trivial
    assert np.isfinite(alone.accuracy).all()


def test_intervals_hold_the_estimate_and_the_seed_decides() -> None:
    model, tokens = model_and_tokens()
    labels = tokens % 3
    once, again, other = (probe_latent(model, tokens, labels, 3, n_loops=N_LOOPS, groups=GROUPS, seed=seed,
                                       hook="hook_attn_out") for seed in (0, 0, 1))
    assert once.identical(again)
    assert not np.array_equal(once.accuracy, other.accuracy)
    for name in ("accuracy", "selectivity"):
        assert (once[f"{name}_low"] <= once[name] + 1e-6).all()
        assert (once[name] <= once[f"{name}_high"] + 1e-6).all()
    width = (once.accuracy_high - once.accuracy_low).values
    binomial = 2 * 1.96 * np.sqrt(once.accuracy * (1 - once.accuracy) / once.n_test).values
    np.testing.assert_allclose(width, binomial, rtol=0.6, atol=0.01)   # positions here are nearly independent


@pytest.mark.unchecked
@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": torch.zeros(240, 3, dtype=torch.long)}, r"labels must be \[batch, pos\]"),
    ({"groups": GROUPS[:4]}, r"groups \[pos\]"),
    ({"control_types": torch.zeros(2, 2, dtype=torch.long)}, r"control_types must be \[batch, pos\]"),
    ({"test_fraction": 0.0}, "test_fraction 0.0 of 240 examples leaves 0 to test on"),
    ({"labels": torch.full((240, N_POS), -1)}, "group 0: no labelled example is in the training set"),
    ({"hook": "hook_nothing"}, "No site is called"),
])
def test_illegal_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    model, tokens = model_and_tokens()
    options: dict[str, Any] = {"labels": tokens % 2, "groups": GROUPS, **changes}
    with pytest.raises(ValueError, match=message):
        probe_latent(model, tokens, options.pop("labels"), 2, n_loops=N_LOOPS, **options)
