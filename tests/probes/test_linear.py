"""Linear probes: scikit-learn's answers, planted variables found, absent ones not, held-out examples held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from torch import Tensor

from hooks import HookedLoopMDM
from probes import probe_latent
from probes.linear import LogisticProbe, latents
from probes.linear.held_out import held_out
from tests.small import MASK, small_model

N_LOOPS = 2
N_POS = 8
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


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
    judged = held_out(len(tokens), 0.25, seed=3)
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, N_LOOPS, names_filter="blocks.*.hook_mlp_out")
    x = rec["blocks.1.hook_mlp_out@1"][:, 4:].double()
    y = labels[:, 4:]
    train, test = (y >= 0) & ~judged[:, None], (y >= 0) & judged[:, None]
    scale = x[train].square().mean().sqrt()
    theirs = RidgeClassifier(alpha=1.0).fit((x / scale)[train].numpy(), y[train].numpy())
    expected = theirs.score((x / scale)[test].numpy(), y[test].numpy())
    np.testing.assert_allclose(result.accuracy.isel(depth=3).sel(group=1), expected, rtol=1e-6)
    assert int(result.n_test.sel(group=1)) == int(test.sum())


def test_the_control_task_is_a_class_per_type_balanced_and_the_same_everywhere() -> None:
    positions = torch.arange(6).expand(10, 6)
    everywhere = torch.ones(6, dtype=torch.bool)
    control = latents._control_labels(positions, everywhere, 2, torch.Generator().manual_seed(0))
    assert control is not None
    assert (control == control[0]).all()
    assert torch.bincount(control[0]).tolist() == [3, 3]
    some = latents._control_labels(positions, positions[0] > 1, 2, torch.Generator().manual_seed(0))
    assert some is not None
    assert (some[:, :2] == -1).all()
    assert torch.bincount(some[0, 2:]).tolist() == [2, 2]
    words = torch.randint(0, 9, (10, 6), generator=torch.Generator().manual_seed(1)) * 7
    by_word = latents._control_labels(words, everywhere, 3, torch.Generator().manual_seed(0))
    assert by_word is not None
    assert all(len(by_word[words == word].unique()) == 1 for word in words.unique())
    assert latents._control_labels(positions, positions[0] == 0, 2, torch.Generator()) is None


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


def test_shares_of_examples_make_up_the_accuracy() -> None:
    model, tokens = model_and_tokens(40)
    labels = torch.where(tokens == 0, -1, tokens % 3)
    found = probe_latent(model, tokens, labels, 3, n_loops=N_LOOPS, groups=GROUPS)
    counted = (labels[torch.tensor(found.example.values)] >= 0).view(-1, 2, 4).sum(-1).T.numpy()     # [group, example]
    for share, whole in ((found.right, found.accuracy), (found.control_right, found.control_accuracy)):
        np.testing.assert_allclose((share.fillna(0) * counted).sum("example") / found.n_test, whole, rtol=1e-6)
    assert (found.right.isnull().values == (counted == 0)).all()


def test_any_probe_will_do_and_chooses_its_penalty_by_examples() -> None:
    model, tokens = model_and_tokens()
    probe = LogisticProbe(C=[1e-6, 1.0], scale=True)
    found = probe_latent(model, tokens, tokens % 2, 2, n_loops=N_LOOPS, groups=GROUPS, probe=probe)
    assert (found.accuracy.isel(depth=0) > 0.9).all()          # C = 1e-6 alone answers with the commoner class
    assert found.attrs["probe"] == str(probe)
    assert "logistic regression" in found.accuracy.definition


@pytest.mark.unchecked
@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": torch.zeros(240, 3, dtype=torch.long)}, r"labels must be \[batch, pos\]"),
    ({"groups": GROUPS[:4]}, r"groups \[pos\]"),
    ({"control_types": torch.zeros(2, 2, dtype=torch.long)}, r"control_types must be \[batch, pos\]"),
    ({"test_fraction": 0.0}, "test_fraction 0.0 of 240 examples leaves 0 to test on"),
    ({"labels": torch.full((240, N_POS), -1)}, "group 0: no labelled example is in the training set"),
    ({"labels": torch.full((240, N_POS), 2)}, "with n_classes=2 they are 0..1, and −1"),
    ({"groups": torch.full((N_POS,), -1)}, "no position is in a group"),
    ({"probe": LogisticProbe(C=0.0)}, "C must be above 0"),
    ({"hook": "hook_nothing"}, "No site is called"),
])
def test_illegal_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    model, tokens = model_and_tokens()
    options: dict[str, Any] = {"labels": tokens % 2, "groups": GROUPS, **changes}
    with pytest.raises(ValueError, match=message):
        probe_latent(model, tokens, options.pop("labels"), 2, n_loops=N_LOOPS, **options)
